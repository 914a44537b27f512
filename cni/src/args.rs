//! What the runtime says through the environment.

use std::env;
use std::path::PathBuf;

use flannel_core::words::name::{Attachment, LinkName};

use crate::result::CniError;

/// What is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Verb {
    Add,
    Del,
    Check,
    Gc,
    Status,
}

/// What the environment asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Asked {
    /// Nothing, as when a person starts the plugin.
    Nothing,
    /// Which versions there are: nothing else need be said for that.
    Versions,
    /// Something to do.
    Call(Call),
}

impl Verb {
    fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "ADD" => Self::Add,
            "DEL" => Self::Del,
            "CHECK" => Self::Check,
            "GC" => Self::Gc,
            "STATUS" => Self::Status,
            _ => return None,
        })
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Gc => "GC",
            Self::Status => "STATUS",
        }
    }

    /// Variables that must be there and not empty.
    fn required(self) -> &'static [&'static str] {
        match self {
            Self::Add | Self::Check => &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"],
            Self::Del => &["CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"],
            Self::Gc | Self::Status => &["CNI_PATH"],
        }
    }
}

/// The environment of one call. An empty variable counts as missing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Call {
    pub(crate) verb: Verb,
    container: String,
    interface: String,
    /// Namespace of the container; empty where the runtime has none any more.
    pub(crate) netns: String,
    /// Where delegated plugins are looked for.
    pub(crate) path: Vec<PathBuf>,
    /// CNI_ARGS as given.
    pub(crate) args: String,
    /// The runtime insists on a namespace that is our own.
    pub(crate) any_netns: bool,
}

impl Call {
    /// Reads this process's environment.
    pub(crate) fn from_env() -> Result<Asked, CniError> {
        Self::read(|name| env::var_os(name).map(|value| value.to_string_lossy().into_owned()))
    }

    fn read(get: impl Fn(&str) -> Option<String>) -> Result<Asked, CniError> {
        let get = |name: &str| get(name).filter(|value| !value.is_empty());
        let Some(verb) = get("CNI_COMMAND") else { return Ok(Asked::Nothing) };
        if verb == "VERSION" {
            return Ok(Asked::Versions);
        }
        let wrong = |msg| CniError::new(CniError::ENVIRONMENT, msg);
        let verb = Verb::parse(&verb).ok_or_else(|| wrong(format!("unknown CNI_COMMAND: {verb}")))?;
        let missing: Vec<&str> = verb.required().iter().copied().filter(|name| get(name).is_none()).collect();
        if !missing.is_empty() {
            return Err(wrong(format!("required env variables [{}] missing", missing.join(","))));
        }
        let text = |name: &str| get(name).unwrap_or_default();
        Ok(Asked::Call(Self {
            verb,
            container: text("CNI_CONTAINERID"),
            interface: text("CNI_IFNAME"),
            netns: text("CNI_NETNS"),
            path: env::split_paths(&text("CNI_PATH")).collect(),
            args: text("CNI_ARGS"),
            any_netns: matches!(text("CNI_NETNS_OVERRIDE").to_ascii_uppercase().as_str(), "1" | "TRUE"),
        }))
    }

    /// Which container and interface it is about, checked: both end up in file names.
    pub(crate) fn attachment(&self) -> Result<Attachment, CniError> {
        if !is_identifier(&self.container) {
            return Err(CniError::new(CniError::ENVIRONMENT, "invalid characters in containerID")
                .with_details(format!("CNI_CONTAINERID is {:?}", self.container)));
        }
        self.link()?;
        Ok(Attachment { container: self.container.clone(), interface: self.interface.clone() })
    }

    /// The container's interface.
    pub(crate) fn link(&self) -> Result<LinkName, CniError> {
        LinkName::new(&self.interface).map_err(|error| {
            CniError::new(CniError::ENVIRONMENT, "invalid interface name")
                .with_details(format!("CNI_IFNAME: {error}"))
        })
    }
}

/// `[a-zA-Z0-9][a-zA-Z0-9_.\-]*`, for container ids and network names.
pub(crate) fn is_identifier(text: &str) -> bool {
    let mut bytes = text.bytes();
    bytes.next().is_some_and(|first| first.is_ascii_alphanumeric())
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
}

/// What CNI_ARGS asks for: `KEY=VALUE;KEY=VALUE`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct CniArgs {
    pub(crate) ip: Option<String>,
    pub(crate) mac: Option<String>,
}

impl CniArgs {
    /// A key nobody here knows is an error unless `IgnoreUnknown` is among them.
    pub(crate) fn parse(text: &str) -> Result<Self, CniError> {
        let wrong =
            |details| CniError::new(CniError::ENVIRONMENT, "CNI_ARGS cannot be used").with_details(details);
        let mut args = Self::default();
        let (mut unknown, mut ignore) = (Vec::new(), false);
        for pair in text.split(';').filter(|pair| !pair.is_empty()) {
            let (key, value) = match pair.split_once('=') {
                Some((key, value)) if !value.contains('=') => (key, value),
                _ => return Err(wrong(format!("{pair:?} is not KEY=VALUE"))),
            };
            let given = Some(value.to_owned()).filter(|value| !value.is_empty());
            match key {
                "IP" => args.ip = given,
                "MAC" => args.mac = given,
                // Read by host-local and then never used.
                "GATEWAY" => {}
                "IgnoreUnknown" => ignore = matches!(value.to_ascii_lowercase().as_str(), "1" | "true"),
                _ => unknown.push(key),
            }
        }
        if !unknown.is_empty() && !ignore {
            return Err(wrong(format!("unknown args {unknown:?}, and IgnoreUnknown=1 is not given")));
        }
        Ok(args)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(variables: &[(&str, &str)]) -> Result<Asked, CniError> {
        Call::read(|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        })
    }

    fn call(variables: &[(&str, &str)]) -> Call {
        match asked(variables) {
            Ok(Asked::Call(call)) => call,
            other => panic!("no call: {other:?}"),
        }
    }

    #[test]
    fn what_is_missing_is_named_together() {
        let error =
            asked(&[("CNI_COMMAND", "ADD"), ("CNI_CONTAINERID", "a"), ("CNI_PATH", "/x"), ("CNI_NETNS", "")]);
        assert_eq!(
            error.unwrap_err(),
            CniError::new(4, "required env variables [CNI_NETNS,CNI_IFNAME] missing")
        );
        assert_eq!(asked(&[("CNI_COMMAND", "ADDD")]).unwrap_err().msg, "unknown CNI_COMMAND: ADDD");
        assert_eq!(asked(&[]), Ok(Asked::Nothing));
        assert_eq!(asked(&[("CNI_COMMAND", "VERSION")]), Ok(Asked::Versions));
    }

    #[test]
    fn del_needs_no_namespace() {
        let call = call(&[
            ("CNI_COMMAND", "DEL"),
            ("CNI_CONTAINERID", "default-ABC.1_2"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_PATH", "/a:/b"),
        ]);
        assert_eq!((call.netns.as_str(), call.path.len()), ("", 2));
        assert_eq!(call.attachment().unwrap().to_string(), "default-ABC.1_2/eth0");
    }

    #[test]
    fn identities_become_file_names_and_are_checked() {
        for (id, interface) in [("../x", "eth0"), ("a/b", "eth0"), ("-a", "eth0"), ("a", ".."), ("a", "e/0")]
        {
            let call = call(&[
                ("CNI_COMMAND", "DEL"),
                ("CNI_CONTAINERID", id),
                ("CNI_IFNAME", interface),
                ("CNI_PATH", "/a"),
            ]);
            assert_eq!(call.attachment().unwrap_err().code, 4, "{id} {interface}");
        }
    }

    #[test]
    fn args_are_pairs() {
        let args =
            CniArgs::parse("IgnoreUnknown=1;K8S_POD_NAME=x;IP=10.5.1.7;MAC=0a:58:00:00:00:01").unwrap();
        assert_eq!(args.ip.as_deref(), Some("10.5.1.7"));
        assert_eq!(args.mac.as_deref(), Some("0a:58:00:00:00:01"));
        assert!(CniArgs::parse("K8S_POD_NAME=x").is_err());
        assert!(CniArgs::parse("IP").is_err());
        assert!(CniArgs::parse("IP=a=b").is_err());
        assert_eq!(CniArgs::parse("").unwrap(), CniArgs::default());
    }
}
