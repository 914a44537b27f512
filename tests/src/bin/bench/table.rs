//! Tables of figures, as text that is a Markdown table too.

/// Prints rows under a head, in columns of equal width; the first column to the left, the others to the right.
pub(crate) fn print(head: &[&str], rows: &[Vec<String>]) {
    let width = |i: usize| {
        let cells = rows.iter().filter_map(|row| row.get(i)).map(|cell| cell.chars().count());
        cells.chain([head[i].chars().count()]).max().unwrap_or(0)
    };
    let line = |cells: &[&str]| {
        let mut text = String::from("|");
        for (i, cell) in cells.iter().enumerate() {
            let width = width(i);
            text.push_str(&if i == 0 { format!(" {cell:<width$} |") } else { format!(" {cell:>width$} |") });
        }
        println!("{text}");
    };
    line(head);
    let rules: Vec<String> = (0..head.len())
        .map(|i| format!("{}{}", "-".repeat(width(i) - 1), if i == 0 { "-" } else { ":" }))
        .collect();
    line(&rules.iter().map(String::as_str).collect::<Vec<_>>());
    for row in rows {
        line(&row.iter().map(String::as_str).collect::<Vec<_>>());
    }
}

/// The middle one of some figures.
pub(crate) fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    match figures.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => figures[n / 2],
        n => (figures[n / 2 - 1] + figures[n / 2]) / 2.0,
    }
}

/// KiB as MB with one digit.
pub(crate) fn megabytes(kib: u64) -> String {
    format!("{:.1} MB", kib as f64 * 1024.0 / 1e6)
}
