//! Settings of the container's kernel (`sysctl`): those of its network, and of these the ones that the node allows.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Component, Path};

use flannel_core::touch::world::World;
use flannel_core::touch::world::kernel::Kernel;
use flannel_core::words::fact::{Change, Fact, Sysctl};
use flannel_core::words::name::LinkName;
use flannel_core::words::territory::Territory;

use super::pattern::Pattern;
use crate::conf::Conf;
use crate::json::{Object, object};
use crate::result::CniError;

/// Where the node says which settings are allowed; all of the network's without it (upstream's place and meaning).
const ALLOWED: &str = "/etc/cni/tuning/allowlist.conf";

/// Settings that were asked for, by path below /proc/sys.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Settings(BTreeMap<String, String>);

impl Settings {
    /// What `sysctl` asks for, in the configuration and in `args.cni`, for this interface of a container.
    pub(crate) fn read(conf: &Conf, link: LinkName) -> Result<Self, CniError> {
        let given = [("sysctl", &conf.given), ("args.cni.sysctl", &conf.cni_args)];
        let mut settings = BTreeMap::new();
        for (place, from) in given {
            let asked: Object = object(from, "sysctl")?.unwrap_or_default();
            for (key, value) in &asked {
                let value = value.as_str().ok_or_else(|| {
                    CniError::decoding(format!("{place}: {key} is {value}, a string was expected"))
                })?;
                settings.insert(path(key, link)?, (key.clone(), value.to_owned()));
            }
        }
        if !settings.is_empty() {
            let keys = settings.values().map(|(key, _)| key.as_str());
            refuse_what_is_not_allowed(Path::new(ALLOWED), keys)?;
        }
        Ok(Self(settings.into_iter().map(|(path, (_, value))| (path, single_blanks(&value))).collect()))
    }

    /// Whether there are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Makes them, in the container.
    pub(crate) fn set(&self, inside: &mut Kernel) -> Result<(), CniError> {
        let facts: Vec<Fact> = self.facts().collect();
        let changes: Vec<Change<'_>> = facts.iter().map(Change::Create).collect();
        inside.apply(&changes).into_iter().collect::<Result<(), _>>().map_err(CniError::from)
    }

    /// What is not as asked, as the lines that would make it so.
    pub(crate) fn missing(&self, inside: &mut Kernel) -> Result<Vec<String>, CniError> {
        let territory = Territory {
            sysctls: self.0.keys().map(|path| (None, path.clone())).collect(),
            ..Territory::default()
        };
        let seen = inside.observe(&territory)?;
        let is_missing = |fact: &Fact| seen.get(&fact.key()) != Some(fact);
        Ok(self.facts().filter(is_missing).map(|fact| fact.to_string()).collect())
    }

    fn facts(&self) -> impl Iterator<Item = Fact> {
        self.0.iter().map(|(path, value)| {
            Fact::Sysctl(Sysctl { link: None, path: path.clone(), value: value.clone() })
        })
    }
}

/// The path below /proc/sys that a key stands for: with dots, or with slashes where a name has a dot in it, as `sysctl` has it.
/// `IFNAME` is the interface this is about.
fn path(key: &str, link: LinkName) -> Result<String, CniError> {
    let slashed = match key.find(['.', '/']) {
        Some(at) if key[at..].starts_with('/') => key.to_owned(),
        _ => key.replace('.', "/"),
    };
    let path = slashed.replacen("IFNAME", link.as_str(), 1);
    let mut parts = Path::new(&path).components();
    let of_network = parts.next() == Some(Component::Normal("net".as_ref()));
    match of_network
        && parts.clone().next().is_some()
        && parts.all(|part| matches!(part, Component::Normal(_)))
    {
        true => Ok(path),
        false => Err(CniError::config(format!("invalid net sysctl key: {key:?}"))
            .with_details("only settings of the container's network (net.*) can be set")),
    }
}

fn refuse_what_is_not_allowed<'a>(list: &Path, keys: impl Iterator<Item = &'a str>) -> Result<(), CniError> {
    let text = match fs::read_to_string(list) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => {
            return Err(CniError::new(CniError::INPUT, format!("could not read {}", list.display()))
                .with_details(error.to_string()));
        }
    };
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let patterns = lines.iter().map(|line| {
        let wrong =
            |what| CniError::config(format!("{}: cannot use {line:?}: it has {what}", list.display()));
        Pattern::parse(line).map_err(wrong)
    });
    let patterns = patterns.collect::<Result<Vec<_>, _>>()?;
    for key in keys {
        if !patterns.iter().any(|pattern| pattern.is_in(key)) {
            return Err(CniError::config(format!(
                "Sysctl {key} is not allowed. Only the following sysctls are allowed: {lines:?}"
            ))
            .with_details(format!("they are in {}", list.display())));
        }
    }
    Ok(())
}

/// As the kernel shows values that are several numbers.
fn single_blanks(value: &str) -> String {
    value.split_ascii_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn eth0() -> LinkName {
        LinkName::new("eth0.5").unwrap()
    }

    #[test]
    fn keys_are_paths_of_the_network_and_no_others() {
        for (key, wanted) in [
            ("net.core.somaxconn", "net/core/somaxconn"),
            ("net.ipv4.conf.IFNAME.arp_filter", "net/ipv4/conf/eth0.5/arp_filter"),
            ("net/ipv4/conf/eth0.5/arp_filter", "net/ipv4/conf/eth0.5/arp_filter"),
        ] {
            assert_eq!(path(key, eth0()).unwrap(), wanted);
        }
        for wrong in [
            "kernel.msgmax",
            "net",
            "net.",
            "",
            "/net/core/x",
            "net/../kernel/msgmax",
            "netx.core",
            "vm.swappiness",
        ] {
            assert_eq!(path(wrong, eth0()).unwrap_err().code, 7, "{wrong}");
        }
    }

    #[test]
    fn only_what_a_node_allows_is_set() {
        let dir = tempfile::tempdir().unwrap();
        let list = dir.path().join("allowlist.conf");
        let check = |key: &str| refuse_what_is_not_allowed(&list, [key].into_iter());
        check("net.core.anything").unwrap();
        fs::write(&list, "\n  ^net.core.somaxconn$\n^net.ipv4.conf.IFNAME.[a-z_]+$\n\n").unwrap();
        check("net.core.somaxconn").unwrap();
        check("net.ipv4.conf.IFNAME.arp_filter").unwrap();
        let refused = check("net.ipv4.ip_forward").unwrap_err();
        assert!(
            refused.code == 7 && refused.msg.contains("Sysctl net.ipv4.ip_forward is not allowed"),
            "{refused}"
        );
        fs::write(&list, r"^net\.\w+$").unwrap();
        assert!(check("net.core").unwrap_err().msg.contains("cannot use"));
        fs::write(&list, "").unwrap();
        assert_eq!(check("net.core.somaxconn").unwrap_err().code, 7, "an empty list allows nothing");
    }
}
