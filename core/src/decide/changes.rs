//! What is different in a later config, in words for the log. Secrets are not shown.

use crate::words::addr::Family;
use crate::words::config::{NetworkConfig, Range};

/// Each difference as `what before -> after`.
pub fn between(before: &NetworkConfig, after: &NetworkConfig) -> Vec<String> {
    let mut changes = Vec::new();
    for family in Family::BOTH {
        let keys = match family {
            Family::V4 => ["Network", "SubnetLen", "SubnetMin", "SubnetMax"],
            Family::V6 => ["IPv6Network", "IPv6SubnetLen", "IPv6SubnetMin", "IPv6SubnetMax"],
        };
        let (was, is) = (shown(before.range(family).copied()), shown(after.range(family).copied()));
        changes.extend(keys.iter().zip(was.iter().zip(&is)).filter(|(_, (was, is))| was != is).map(
            |(key, (was, is))| {
                let said = |value: &Option<String>| value.clone().unwrap_or_else(|| "none".to_owned());
                format!("{key} {} -> {}", said(was), said(is))
            },
        ));
    }
    let (was, is) = (before.backend.name(), after.backend.name());
    if was != is {
        changes.push(format!("Backend {was} -> {is}"));
    } else if before.backend != after.backend {
        changes.push(format!("options of backend {is}"));
    }
    changes
}

fn shown(range: Option<Range>) -> [Option<String>; 4] {
    let Some(range) = range else { return [const { None }; 4] };
    let texts = [
        range.cidr.to_string(),
        range.subnet_len().to_string(),
        range.first.base().to_string(),
        range.last.base().to_string(),
    ];
    texts.map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changes(before: &str, after: &str) -> String {
        let config = |text: &str| NetworkConfig::parse(text).unwrap().config;
        between(&config(before), &config(after)).join(", ")
    }

    #[test]
    fn each_change_is_named_with_before_and_after() {
        let plain = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;
        assert_eq!(changes(plain, plain), "");
        let narrow = r#"{"Network":"10.5.0.0/16","SubnetLen":25,"Backend":{"Type":"vxlan"}}"#;
        assert_eq!(
            changes(plain, narrow),
            "SubnetLen 24 -> 25, SubnetMin 10.5.1.0 -> 10.5.0.128, SubnetMax 10.5.255.0 -> 10.5.255.128"
        );
        assert_eq!(changes(plain, &plain.replace("vxlan", "host-gw")), "Backend vxlan -> host-gw");
        let port = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","Port":4789}}"#;
        assert_eq!(changes(plain, port), "options of backend vxlan");
        let dual = r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":{"Type":"vxlan"}}"#;
        assert!(
            changes(plain, dual).starts_with("IPv6Network none -> fd00:5::/48, "),
            "{}",
            changes(plain, dual)
        );
    }
}
