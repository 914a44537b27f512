//! Go's flag syntax and the environment, turned into what clap reads.

use std::collections::BTreeMap;
use std::net::Ipv6Addr;

use clap::Command;

const PREFIX: &str = "FLANNELD_";

/// The process's environment, or one that a test made.
#[derive(Clone, Debug, Default)]
pub struct Environment(pub BTreeMap<String, String>);

impl Environment {
    /// The process's own; variables that are not text are left out.
    pub fn of_process() -> Self {
        Self(
            std::env::vars_os()
                .filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)))
                .collect(),
        )
    }
}

pub(super) struct Normalized {
    pub(super) line: Vec<String>,
    /// Variables that were taken.
    pub(super) from_environment: Vec<String>,
}

/// `-x` becomes `--x`; flags that were not given are taken from the environment; flags that are not built yet are
/// refused by name.
pub(super) fn normalize(
    arguments: impl IntoIterator<Item = String>,
    environment: &Environment,
    command: &Command,
    not_built: &[&str],
) -> Result<Normalized, String> {
    let mut arguments = arguments.into_iter();
    let mut line: Vec<String> = arguments.next().into_iter().collect();
    let mut given: Vec<String> = Vec::new();
    for argument in arguments {
        let argument = two_dashes(argument);
        if let Some(flag) = argument.strip_prefix("--") {
            let name = flag.split('=').next().unwrap_or(flag).to_owned();
            if not_built.contains(&name.as_str()) {
                return Err(format!("--{name} is not built yet in this version"));
            }
            given.push(name);
        }
        line.push(argument);
    }
    let variable = |name: &str| format!("{PREFIX}{}", name.to_uppercase().replace('-', "_"));
    let set = |name: &str| environment.0.get(&variable(name)).filter(|value| !value.is_empty());
    if let Some(name) = not_built.iter().find(|name| set(name).is_some()) {
        return Err(format!("{} is not built yet in this version", variable(name)));
    }
    let mut from_environment = Vec::new();
    for flag in command.get_arguments().filter_map(|argument| argument.get_long()) {
        let skipped = matches!(flag, "version" | "help") || given.iter().any(|name| name == flag);
        if let Some(value) = set(flag).filter(|_| !skipped) {
            line.push(format!("--{flag}={value}"));
            from_environment.push(variable(flag));
        }
    }
    Ok(Normalized { line, from_environment })
}

/// `-etcd-prefix=x` to `--etcd-prefix=x`; negative numbers, `-` and `-h` stay as they are.
fn two_dashes(argument: String) -> String {
    let mut letters = argument.chars();
    match (letters.next(), letters.next()) {
        (Some('-'), Some(second)) if second.is_ascii_alphabetic() && argument != "-h" => {
            format!("-{argument}")
        }
        _ => argument,
    }
}

/// An IPv6 address that another host can use as it stands.
pub(super) fn parse_public_ipv6(text: &str) -> Result<Ipv6Addr, String> {
    let address: Ipv6Addr =
        text.parse().map_err(|_| "an IPv6 address was wanted, without a length".to_owned())?;
    let unusable = address.is_unspecified()
        || address.is_loopback()
        || address.is_multicast()
        || address.is_unicast_link_local()
        || address.to_ipv4_mapped().is_some();
    match unusable {
        true => Err("no other host can reach this address".to_owned()),
        false => Ok(address),
    }
}

/// What Go's `strconv.ParseBool` takes.
pub(super) fn parse_bool(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "TRUE" | "true" | "True" => Ok(true),
        "0" | "f" | "F" | "FALSE" | "false" | "False" => Ok(false),
        _ => Err("true or false was wanted".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::cli::{CommonFlags, parse};
    use clap::Parser;

    #[derive(Parser, Debug)]
    #[command(name = "flanneld", version)]
    struct Flags {
        #[command(flatten)]
        common: CommonFlags,
    }

    fn flags(line: &[&str], variables: &[(&str, &str)]) -> Result<CommonFlags, String> {
        let environment =
            Environment(variables.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect());
        let line = std::iter::once("flanneld").chain(line.iter().copied()).map(str::to_owned);
        parse::<Flags>(line, &environment).map(|flags| flags.common).map_err(|refusal| {
            assert_eq!(refusal.status, 2, "{}", refusal.text);
            refusal.text
        })
    }

    #[test]
    fn one_dash_or_two_with_space_or_equals() {
        for line in [
            &["-etcd-prefix", "/x", "-ip-masq"][..],
            &["--etcd-prefix=/x", "--ip-masq=true"],
            &["-etcd-prefix=/x", "--ip-masq=T"],
        ] {
            let flags = flags(line, &[]).unwrap();
            assert!(flags.ip_masq && flags.etcd_prefix == "/x", "{line:?}");
        }
        assert!(!flags(&["--iptables-forward-rules=false"], &[]).unwrap().iptables_forward_rules);
        assert_eq!(flags(&["-iface", "eth0", "-iface=10.0.0.1"], &[]).unwrap().iface, ["eth0", "10.0.0.1"]);
        assert_eq!(flags(&["-healthz-port", "-1"], &[]).unwrap().health_address(), None);
    }

    #[test]
    fn the_line_outweighs_the_environment_and_empty_is_unset() {
        let variables =
            [("FLANNELD_ETCD_PREFIX", "/env"), ("FLANNELD_IP_MASQ", "1"), ("FLANNELD_PUBLIC_IP", "")];
        let from_environment = flags(&[], &variables).unwrap();
        assert_eq!(from_environment.etcd_prefix, "/env");
        assert!(from_environment.ip_masq && from_environment.public_ip.is_none());
        assert_eq!(flags(&["-etcd-prefix", "/line"], &variables).unwrap().etcd_prefix, "/line");
    }

    #[test]
    fn a_public_ipv6_address_is_one_that_others_can_use() {
        let address = flags(&["-public-ipv6", "2001:DB8::0:1"], &[]).unwrap().public_ipv6;
        assert_eq!(address.map(|address| address.to_string()).as_deref(), Some("2001:db8::1"));
        for wrong in ["192.0.2.1", "fe80::1", "::1", "2001:db8::1/64", "::ffff:192.0.2.1"] {
            assert!(flags(&["-public-ipv6", wrong], &[]).unwrap_err().contains("--public-ipv6"), "{wrong}");
        }
    }

    #[test]
    fn what_is_not_built_or_unknown_is_refused_by_name() {
        assert!(
            flags(&["-kube-subnet-mgr"], &[]).unwrap_err().contains("--kube-subnet-mgr is not built yet")
        );
        assert!(
            flags(&[], &[("FLANNELD_IFACE_REGEX", "eth.*")]).unwrap_err().contains("FLANNELD_IFACE_REGEX")
        );
        assert!(flags(&["--no-such"], &[]).unwrap_err().contains("--no-such"));
        let wrong = flags(&[], &[("FLANNELD_SUBNET_LEASE_RENEW_MARGIN", "1440")]).unwrap_err();
        assert!(wrong.contains("Taken from the environment: FLANNELD_SUBNET_LEASE_RENEW_MARGIN"), "{wrong}");
    }
}
