//! What the runtime says on stdin, as far as every plugin reads it (SPEC.md, "Configuration format").

use std::net::IpAddr;

use flannel_core::words::addr::Mac;
use flannel_core::words::name::Attachment;
use serde_json::Value;

use crate::args::{CniArgs, is_identifier};
use crate::json::{Object, asks, field, object, string, text};
use crate::result::{CniError, Version};

/// A plugin's configuration.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Conf {
    pub(crate) version: Version,
    /// The network's name as the runtime knows it.
    pub(crate) name: String,
    /// What an earlier plugin, or our own ADD, printed.
    pub(crate) previous: Option<Value>,
    /// GC: what is still in use. None if the runtime did not say.
    pub(crate) valid: Option<Vec<Attachment>>,
    /// `runtimeConfig`: what was asked for through capabilities.
    pub(crate) runtime: Object,
    /// `args.cni`.
    pub(crate) cni_args: Object,
    pub(crate) dns: Object,
    /// Everything, as given.
    pub(crate) given: Object,
}

impl Conf {
    /// Reads stdin. The version is the last thing looked at, as Go does: who has no name has no version either.
    pub(crate) fn parse(stdin: &[u8]) -> Result<Self, CniError> {
        let given: Object = serde_json::from_slice(stdin).map_err(|error| {
            CniError::new(CniError::DECODING, "error unmarshall network config")
                .with_details(error.to_string())
        })?;
        let name = string(&given, "name")?.unwrap_or_default();
        if name.is_empty() {
            return Err(CniError::config("missing network name"));
        }
        if !is_identifier(&name) {
            return Err(CniError::config("invalid characters found in network name")
                .with_details(format!("name is {name:?}")));
        }
        let args = object(&given, "args")?.unwrap_or_default();
        Ok(Self {
            version: Version::negotiate(string(&given, "cniVersion")?.as_deref())?,
            name,
            previous: field(&given, "prevResult").filter(|previous| !previous.is_null()).cloned(),
            valid: valid_attachments(&given)?,
            runtime: object(&given, "runtimeConfig")?.unwrap_or_default(),
            cni_args: object(&args, "cni")?.unwrap_or_default(),
            dns: object(&given, "dns")?.unwrap_or_default(),
            given,
        })
    }

    /// All addresses asked for, by whatever way: runtimes use three.
    pub(crate) fn ips(&self, args: &CniArgs) -> Result<Vec<IpAddr>, CniError> {
        let mut ips: Vec<String> = args.ip.iter().cloned().collect();
        for (place, object) in [("args.cni", &self.cni_args), ("runtimeConfig", &self.runtime)] {
            let Some(list) = field(object, "ips").filter(|ips| asks(ips)) else { continue };
            let wrong = |what: &dyn std::fmt::Display| CniError::decoding(format!("{place}.ips {what}"));
            for ip in list.as_array().ok_or_else(|| wrong(&"is not a list"))? {
                ips.push(ip.as_str().ok_or_else(|| wrong(&format!("holds {ip}")))?.to_owned());
            }
        }
        let parse = |text: &String| -> Result<IpAddr, CniError> {
            let bare = text.split('/').next().unwrap_or_default();
            bare.parse().map_err(|_| CniError::config(format!("{text:?} was asked for and is no address")))
        };
        let mut parsed = ips.iter().map(parse).collect::<Result<Vec<_>, _>>()?;
        parsed.sort();
        parsed.dedup();
        Ok(parsed)
    }

    /// The MAC asked for. The last one given wins: CNI_ARGS, then `args`, then the capability.
    pub(crate) fn mac(&self, args: &CniArgs) -> Result<Option<Mac>, CniError> {
        let given = text(&self.runtime, "mac")?.or(text(&self.cni_args, "mac")?).or_else(|| args.mac.clone());
        given
            .map(|mac| mac.parse().map_err(|error| CniError::config(format!("the MAC asked for: {error}"))))
            .transpose()
    }
}

/// `cni.dev/valid-attachments`; libcni also writes the name an earlier draft had.
fn valid_attachments(conf: &Object) -> Result<Option<Vec<Attachment>>, CniError> {
    let given = field(conf, "cni.dev/valid-attachments").or_else(|| field(conf, "cni.dev/attachments"));
    let Some(given) = given.filter(|given| !given.is_null()) else { return Ok(None) };
    let wrong = || CniError::decoding("cni.dev/valid-attachments is not a list of {containerID, ifname}");
    let attachment = |value: &Value| -> Option<Attachment> {
        let value = value.as_object()?;
        let text = |key| Some(field(value, key)?.as_str()?.to_owned());
        Some(Attachment { container: text("containerID")?, interface: text("ifname")? })
    };
    let list = given.as_array().ok_or_else(wrong)?;
    list.iter().map(attachment).collect::<Option<Vec<_>>>().map(Some).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn conf(value: &Value) -> Result<Conf, CniError> {
        Conf::parse(value.to_string().as_bytes())
    }

    #[test]
    fn bad_input_has_the_code_the_spec_gives_it() {
        for (text, code) in [
            ("", 6),
            ("[]", 6),
            ("{", 6),
            ("{}", 7),
            (r#"{"name":"a/b"}"#, 7),
            (r#"{"name":5}"#, 6),
            (r#"{"name":"n","cniVersion":"9.0.0"}"#, 1),
        ] {
            assert_eq!(Conf::parse(text.as_bytes()).unwrap_err().code, code, "{text}");
        }
    }

    #[test]
    fn addresses_and_mac_come_by_three_ways() {
        let conf = conf(
            &json!({ "name": "n", "args": { "cni": { "ips": ["10.1.17.8"], "mac": "0a:58:00:00:00:02" } },
            "RuntimeConfig": { "IPs": ["fd00::9/64"] } }),
        )
        .unwrap();
        let args = CniArgs { ip: Some("10.1.17.7".into()), mac: Some("0a:58:00:00:00:01".into()) };
        let ips: Vec<String> = conf.ips(&args).unwrap().iter().map(IpAddr::to_string).collect();
        assert_eq!(ips, ["10.1.17.7", "10.1.17.8", "fd00::9"]);
        assert_eq!(conf.mac(&args).unwrap().unwrap().to_string(), "0a:58:00:00:00:02");
        let nonsense = CniArgs { ip: Some("x".into()), mac: None };
        assert_eq!(conf.ips(&nonsense).unwrap_err().code, 7);
    }

    #[test]
    fn an_absent_list_of_attachments_is_not_an_empty_one() {
        assert_eq!(conf(&json!({ "name": "n" })).unwrap().valid, None);
        let empty = json!({ "name": "n", "cni.dev/valid-attachments": [] });
        assert_eq!(conf(&empty).unwrap().valid, Some(Vec::new()));
        let one = json!({ "name": "n", "cni.dev/attachments": [{ "containerID": "c", "ifname": "eth0" }] });
        assert_eq!(conf(&one).unwrap().valid.unwrap()[0].to_string(), "c/eth0");
        let wrong = json!({ "name": "n", "cni.dev/valid-attachments": [{ "containerID": "c" }] });
        assert_eq!(conf(&wrong).unwrap_err().code, 6);
    }
}
