//! The guides of docs/guides, as tests type them.

/// The fenced blocks whose first line says that, in order.
pub fn blocks<'a>(guide: &'a str, says: &str) -> Vec<&'a str> {
    // A block in a list is indented as the list is; the shell does not mind.
    let begins = format!("```{says}\n");
    guide.split(&begins).skip(1).filter_map(|rest| rest.split("```").next()).collect()
}
