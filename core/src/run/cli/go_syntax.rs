//! Go's flag syntax and the environment, turned into what clap reads.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use crate::touch::uplink::Pattern;
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
    /// Variables with our prefix that name no flag which may be one.
    pub(super) unread: Vec<String>,
}

/// Never taken from a variable.
const LINE_ONLY: [&str; 3] = ["version", "help", "cleanup"];

/// `-x` becomes `--x`; a flag with an empty value counts as not given, as an empty variable does; flags that were not given
/// are taken from the environment; flags of upstream's that cannot be served are refused by name.
pub(super) fn normalize(
    arguments: impl IntoIterator<Item = String>,
    environment: &Environment,
    command: &Command,
    refused: &[(&str, &str)],
) -> Result<Normalized, String> {
    let mut arguments = arguments.into_iter().peekable();
    let mut line: Vec<String> = arguments.next().into_iter().collect();
    let mut given: Vec<String> = Vec::new();
    while let Some(argument) = arguments.next() {
        let mut argument = two_dashes(argument);
        if let Some(flag) = argument.strip_prefix("--") {
            let (name, value) =
                flag.split_once('=').map_or((flag, None), |(name, value)| (name, Some(value)));
            if is_refused_switch_off(name, value) {
                continue;
            }
            let why = refused.iter().find(|(refused, _)| *refused == name);
            // `-public-ip=$PUBLIC_IP` in a unit, and nobody has set it.
            if value == Some("") && (why.is_some() || takes_value(command, name)) {
                continue;
            }
            if let Some((_, why)) = why {
                return Err(format!("--{name} {why}"));
            }
            // Switches that clap gives no value.
            match value.filter(|_| LINE_ONLY.contains(&name)).map(parse_bool) {
                Some(Ok(false)) => continue,
                Some(Ok(true)) => {
                    line.push(format!("--{name}"));
                    continue;
                }
                Some(Err(_)) | None => {}
            }
            given.push(name.to_owned());
            if value.is_none() && takes_value(command, name) {
                match arguments.next_if(|next| next.is_empty() || is_value(command, refused, next)) {
                    Some(next) if next.is_empty() => {
                        given.pop();
                        continue;
                    }
                    // With `=` nobody takes a value that begins with a dash for a flag, or shows it as an unknown one.
                    Some(next) => argument = format!("--{name}={next}"),
                    None => {}
                }
            }
        }
        line.push(argument);
    }
    let variable = |name: &str| format!("{PREFIX}{}", name.to_uppercase().replace('-', "_"));
    let set = |name: &str| environment.0.get(&variable(name)).filter(|value| !value.is_empty());
    let barred = |name: &str| set(name).is_some_and(|value| !is_refused_switch_off(name, Some(value)));
    if let Some((name, why)) = refused.iter().find(|(name, _)| barred(name)) {
        return Err(format!("{} {why}", variable(name)));
    }
    let mut from_environment = Vec::new();
    let mut known: Vec<String> = refused.iter().map(|(name, _)| variable(name)).collect();
    let mut at = line.len().min(1);
    for flag in command.get_arguments().filter_map(|argument| argument.get_long()) {
        if LINE_ONLY.contains(&flag) {
            continue;
        }
        known.push(variable(flag));
        if let Some(value) = set(flag).filter(|_| !given.iter().any(|name| name == flag)) {
            // Before a subcommand, if there is one.
            line.insert(at, format!("--{flag}={value}"));
            at += 1;
            from_environment.push(variable(flag));
        }
    }
    let unread = environment.0.iter().filter(|(name, value)| name.starts_with(PREFIX) && !value.is_empty());
    let unread = unread.map(|(name, _)| name.clone()).filter(|name| !known.contains(name)).collect();
    Ok(Normalized { line, from_environment, unread })
}

/// What a unit made for the Go program may say for clarity.
fn is_refused_switch_off(name: &str, value: Option<&str>) -> bool {
    name == "kube-subnet-mgr" && value.is_some_and(|value| parse_bool(value) == Ok(false))
}

/// Whether a flag is one with a value that may follow it: switches take theirs behind `=` only.
fn takes_value(command: &Command, name: &str) -> bool {
    let flag = command.get_arguments().find(|argument| argument.get_long() == Some(name));
    flag.is_some_and(|flag| flag.get_action().takes_values() && !flag.is_require_equals_set())
}

/// Whether what follows a flag that takes a value is meant as that, as Go takes it: everything but our own flags, before which
/// somebody forgot it.
fn is_value(command: &Command, refused: &[(&str, &str)], next: &str) -> bool {
    let Some(flag) = next.strip_prefix("--").or_else(|| next.strip_prefix('-')) else { return true };
    let name = flag.split_once('=').map_or(flag, |(name, _)| name);
    let is_ours = command.get_arguments().any(|argument| argument.get_long() == Some(name));
    let is_refused = refused.iter().any(|(refused, _)| *refused == name);
    !(is_ours || is_refused || LINE_ONLY.contains(&name) || name == "h")
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

/// An expression, as `--iface-regex` takes it.
pub(super) fn parse_pattern(text: &str) -> Result<Pattern, String> {
    let regex = regex_lite::Regex::new(text).map_err(|error| error.to_string())?;
    Ok(Pattern::new(text, move |text| regex.is_match(text)))
}

/// An IPv4 address that another host can use as it stands.
pub(super) fn parse_public_ip(text: &str) -> Result<Ipv4Addr, String> {
    let address: Ipv4Addr =
        text.parse().map_err(|_| "an IPv4 address was wanted, without a length".to_owned())?;
    let unusable =
        address.is_unspecified() || address.is_loopback() || address.is_multicast() || address.is_broadcast();
    match unusable {
        true => Err("no other host can reach this address".to_owned()),
        false => Ok(address),
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
        let ifaces = flags(&["-iface", "eth0", "-iface=10.0.0.1"], &[]).unwrap().iface;
        assert_eq!(ifaces, ["eth0".parse().unwrap(), "10.0.0.1".parse().unwrap()]);
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
    fn what_is_empty_is_not_given_and_the_last_of_several_counts() {
        let empty =
            ["-public-ip=", "--etcd-cafile", "", "-iface=", "-iface-regex=", "-etcd-prefix", "", "-v="];
        let from_environment = [("FLANNELD_ETCD_PREFIX", "/env"), ("FLANNELD_KUBE_SUBNET_MGR", "false")];
        let read = flags(&empty, &from_environment).unwrap();
        assert!(read.public_ip.is_none() && read.etcd_cafile.is_none() && read.iface.is_empty());
        assert!(read.iface_regex.is_empty() && read.etcd_prefix == "/env" && read.verbosity == 0);
        let twice =
            ["-etcd-prefix=/a", "-ip-masq", "--etcd-prefix", "/b", "-iface=a", "--ip-masq=false", "-iface=b"];
        let read = flags(&twice, &[]).unwrap();
        assert!(read.etcd_prefix == "/b" && !read.ip_masq && read.iface.len() == 2, "{read:?}");
        assert!(flags(&["--ip-masq="], &[]).unwrap_err().contains("--ip-masq"));
        assert!(flags(&["--healthz-port=70000"], &[]).unwrap_err().contains("--healthz-port"));
    }

    #[test]
    fn a_value_may_begin_with_a_dash_and_a_flag_is_none() {
        let line = [
            "-etcd-username",
            "root",
            "-etcd-password",
            "-s3cret=",
            "-iface-regex",
            "-x$",
            "-healthz-port",
            "-1",
        ];
        let read = flags(&line, &[]).unwrap();
        assert_eq!(read.etcd_password.map(|password| password.reveal().clone()).as_deref(), Some("-s3cret="));
        assert!(read.iface_regex[0].matches("a-x") && read.healthz_port == -1);
        let forgotten = flags(&["-etcd-username", "root", "--etcd-password", "-ip-masq"], &[]).unwrap_err();
        assert!(forgotten.contains("a value is required for '--etcd-password"), "{forgotten}");
    }

    #[test]
    fn what_go_takes_of_switches_and_of_nothing_is_taken() {
        let nothing = ["--kubeconfig-file=", "-vmodule=", "--version=false", "-help=0", "-etcd-prefix=/x"];
        assert_eq!(flags(&nothing, &[]).unwrap().etcd_prefix, "/x");
        assert!(flags(&["-vmodule=a=1"], &[]).unwrap_err().contains("--vmodule"));
        assert!(flags(&["--version=no"], &[]).unwrap_err().contains("--version"));
        let line = ["flanneld", "-version=true"].map(str::to_owned);
        let shown = parse::<Flags>(line, &Environment::default()).unwrap_err();
        assert!(shown.status == 0 && shown.text.contains(env!("CARGO_PKG_VERSION")), "{}", shown.text);
    }

    #[test]
    fn a_variable_that_nothing_reads_is_found() {
        let variables = [
            ("FLANNELD_ETCD_ENDPOINT", "http://192.0.2.1:2379"), // one letter is missing
            ("FLANNELD_CLEANUP", "true"),
            ("FLANNELD_IFACE", "eth0"),
            ("FLANNELD_KUBE_SUBNET_MGR", "false"),
            ("FLANNELD_EMPTY", ""),
            ("FLANNEL_OPTIONS", "-iface=eth0"),
        ];
        let environment =
            Environment(variables.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect());
        let command = <Flags as clap::CommandFactory>::command();
        let read = normalize(["flanneld".to_owned()], &environment, &command, super::super::REFUSED).unwrap();
        assert_eq!(read.unread, ["FLANNELD_CLEANUP", "FLANNELD_ETCD_ENDPOINT"]);
        assert_eq!(read.from_environment, ["FLANNELD_IFACE"]);
    }

    #[test]
    fn halves_of_pairs_are_refused_and_passwords_are_not_repeated() {
        for (half, other) in [
            ("-etcd-certfile=/c", "--etcd-keyfile"),
            ("-etcd-keyfile=/k", "--etcd-certfile"),
            ("-etcd-username=root", "--etcd-password"),
            ("-etcd-password=hunter2", "--etcd-username"),
        ] {
            let wrong = flags(&[half], &[]).unwrap_err();
            assert!(wrong.contains(other) && !wrong.contains("hunter2"), "{half}: {wrong}");
        }
        let password = [("FLANNELD_ETCD_PASSWORD", "hunter2")];
        let wrong = flags(&["--no-such"], &password).unwrap_err();
        assert!(wrong.contains("FLANNELD_ETCD_PASSWORD") && !wrong.contains("hunter2"), "{wrong}");
        let both = flags(&["-etcd-username=root"], &password).unwrap();
        assert!(!format!("{both:?}").contains("hunter2"));
    }

    #[test]
    fn an_interface_is_an_expression_as_go_has_them() {
        let matches = |expression: &str, text: &str| match &flags(&["-iface-regex", expression], &[])
            .unwrap()
            .iface_regex[..]
        {
            [pattern] => pattern.matches(text),
            several => panic!("{several:?}"),
        };
        assert!(
            matches(r"10\.1\.", "10.1.2.3") && matches("th0$", "eth0") && matches("(?i)ETH[0-9]", "eth0")
        );
        assert!(!matches(r"^10\.1\.", "10.10.2.3") && !matches(r"^en\w+|eth\d$", "wlan0"));
        assert!(matches(r"^en\w+|eth\d$", "enp3s0") && matches(r"(?P<bus>p\d)", "enp3s0"));
        let wrong = flags(&["-iface-regex", "eth("], &[]).unwrap_err();
        assert!(wrong.contains("--iface-regex") && wrong.contains("eth("), "{wrong}");
        let several = flags(&["-iface-regex", "a", "-iface-regex=b,c"], &[]).unwrap();
        assert_eq!(several.iface_regex.len(), 2);
        // A variable holds one.
        let one = flags(&[], &[("FLANNELD_IFACE_REGEX", "a,b"), ("FLANNELD_IFACE_CAN_REACH", "192.0.2.1")]);
        let one = one.unwrap();
        assert_eq!((one.iface_regex.len(), one.iface_can_reach), (1, "192.0.2.1".parse().ok()));
        for wrong in [&["-iface", "more than 15 letters"][..], &["-iface-can-reach", "eth0"]] {
            assert!(flags(wrong, &[]).unwrap_err().contains(wrong[0].trim_matches(['-', '='])), "{wrong:?}");
        }
    }

    #[test]
    fn a_public_ipv4_address_is_one_that_others_can_use() {
        assert!(flags(&["-public-ip", "203.0.113.1"], &[]).unwrap().public_ip.is_some());
        for wrong in ["2001:db8::1", "0.0.0.0", "127.0.0.1", "224.0.0.1", "203.0.113.1/24", "localhost"] {
            assert!(flags(&["-public-ip", wrong], &[]).unwrap_err().contains("--public-ip"), "{wrong}");
        }
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
            flags(&["-kube-subnet-mgr"], &[])
                .unwrap_err()
                .contains("--kube-subnet-mgr belongs to the Kubernetes store")
        );
        assert!(
            flags(&[], &[("FLANNELD_NET_CONFIG_PATH", "/x")])
                .unwrap_err()
                .contains("FLANNELD_NET_CONFIG_PATH")
        );
        assert!(flags(&["--no-such"], &[]).unwrap_err().contains("--no-such"));
        let wrong = flags(&[], &[("FLANNELD_SUBNET_LEASE_RENEW_MARGIN", "1440")]).unwrap_err();
        assert!(wrong.contains("Taken from the environment: FLANNELD_SUBNET_LEASE_RENEW_MARGIN"), "{wrong}");
    }
}
