//! `resolvConf`: what a file in the form of resolv.conf(5) says, as a result's `dns`.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::json::Object;
use crate::result::CniError;

/// Reads the file.
pub(super) fn read(file: &Path) -> Result<Object, CniError> {
    match fs::read_to_string(file) {
        Ok(text) => Ok(parse(&text)),
        Err(error) => Err(CniError::config(format!("ipam.resolvConf: could not read {}", file.display()))
            .with_details(error.to_string())),
    }
}

/// Comments, empty lines and words that nobody knows are skipped, as upstream does.
fn parse(text: &str) -> Object {
    let mut dns = Map::new();
    let mut append = |key: &str, words: &[&str]| {
        if let Value::Array(list) = dns.entry(key).or_insert_with(|| json!([])) {
            list.extend(words.iter().map(|word| json!(word)));
        }
    };
    let mut domain = None;
    for line in text.lines().map(str::trim).filter(|line| !line.starts_with(['#', ';'])) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["nameserver", server, ..] => append("nameservers", &[server]),
            ["domain", name, ..] => domain = Some((*name).to_owned()),
            ["search", domains @ ..] if !domains.is_empty() => append("search", domains),
            ["options", options @ ..] if !options.is_empty() => append("options", options),
            _ => {}
        }
    }
    if let Some(domain) = domain {
        dns.insert("domain".to_owned(), json!(domain));
    }
    dns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_known_words_are_read() {
        let text = "# made by hand\nnameserver 10.1.0.1\n ; and\nnameserver 10.1.0.2 ignored\n\
                    domain a.example\nsearch a.example b.example\nsearch c.example\noptions ndots:2\nsortlist x\nsearch\n";
        assert_eq!(
            Value::Object(parse(text)),
            json!({ "nameservers": ["10.1.0.1", "10.1.0.2"], "domain": "a.example",
                    "search": ["a.example", "b.example", "c.example"], "options": ["ndots:2"] })
        );
        assert_eq!(parse("\n#\n"), Map::new());
        assert_eq!(read(Path::new("/nonexistent/resolv.conf")).unwrap_err().code, 7);
    }
}
