//! The plugin `bandwidth`, and shaping as part of `flannel`: limits for what goes to a container and what comes from it
//! (upstream: plugins/meta/bandwidth).
//!
//! What was asked for by a runtime for one container counts only where the configuration says nothing for all, as upstream
//! has it. Shaping is found again by the names it follows from, so taking it down needs no memory.

use flannel_core::decide::shaping::{Asked, Burst, ShapingError, bucket};
use flannel_core::touch::world::kernel::{Kernel, MadeFunnel, SeenBucket};
use flannel_core::words::name::{Attachment, LinkName};
use flannel_core::words::shaping::{Bucket, Funnel, Shaping};
use serde_json::{Value, json};

use crate::args::{Call, Verb};
use crate::bridge::check::drift;
use crate::conf::Conf;
use crate::json::{Object, asked, field, first_asked, number, object, text};
use crate::previous;
use crate::result::{Answer, CniError, Version};
use crate::sandbox;

/// Limits that were asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Limits {
    ingress: Asked,
    egress: Asked,
    burst: Burst,
}

impl Limits {
    /// What the configuration asks for; none if there is no limit.
    pub(crate) fn read(conf: &Conf) -> Result<Option<Self>, CniError> {
        const RATES: [&str; 4] = ["ingressRate", "ingressBurst", "egressRate", "egressBurst"];
        let burst = match text(&conf.given, "burst")?.as_deref() {
            None => Burst::Sane,
            Some("as-asked") => Burst::AsAsked,
            Some(other) => {
                return Err(CniError::config(format!(
                    "burst is {other:?}: leave it out, or say \"as-asked\""
                )));
            }
        };
        let runtime = object(&conf.runtime, "bandwidth")?.unwrap_or_default();
        let for_all = RATES.iter().any(|key| field(&conf.given, key).is_some());
        let (place, from) = if for_all { ("", &conf.given) } else { ("runtimeConfig.bandwidth.", &runtime) };
        for (place, object) in [("", &conf.given), ("runtimeConfig.bandwidth.", &runtime)] {
            if let Some(key) = first_asked(object, &["shapedSubnets", "unshapedSubnets"]) {
                return Err(CniError::unsupported(format!(
                    "{place}{key} is not supported: limits hold for everything that a container sends or receives"
                )));
            }
        }
        let asked = |rate, burst| -> Result<Asked, CniError> {
            Ok(Asked { rate: amount(from, place, rate)?, burst: amount(from, place, burst)? })
        };
        let limits = Self {
            ingress: asked("ingressRate", "ingressBurst")?,
            egress: asked("egressRate", "egressBurst")?,
            burst,
        };
        // Before anything is made; the MTU does not decide whether it can be done.
        let shaping = limits.shaping(1500)?;
        Ok((!shaping.is_none()).then_some(limits))
    }

    fn shaping(&self, mtu: u32) -> Result<Shaping, CniError> {
        Ok(Shaping {
            ingress: bucket(self.ingress, mtu, self.burst)?,
            egress: bucket(self.egress, mtu, self.burst)?,
        })
    }

    /// Shapes what passes the host's end of a container's interface, unless it is so already. The answer is the interface that
    /// packets from the container are sent through.
    pub(crate) fn put_on(
        &self,
        host: &mut Kernel,
        end: LinkName,
        network: &str,
        owner: &Attachment,
    ) -> Result<Option<MadeFunnel>, CniError> {
        if self.missing(host, end)?.is_empty() {
            return Ok(None);
        }
        if self.egress.rate != 0 && host.shaping(end)?.egress.is_some() {
            host.unshape(end, &funnel(network, owner)?)?;
        }
        self.put_on_new(host, end, network, owner)
    }

    /// The same for an interface that was made just now, and has nothing on it yet.
    pub(crate) fn put_on_new(
        &self,
        host: &mut Kernel,
        end: LinkName,
        network: &str,
        owner: &Attachment,
    ) -> Result<Option<MadeFunnel>, CniError> {
        let shaping = self.on(host, end)?;
        Ok(host.shape(end, &funnel(network, owner)?, &shaping)?)
    }

    fn on(&self, host: &mut Kernel, end: LinkName) -> Result<Shaping, CniError> {
        let mtu = host.device(end)?.ok_or_else(|| no_end(end))?.mtu;
        self.shaping(mtu)
    }

    /// What is not as asked, as the lines that would make it so. Upstream's plugin takes every burst as asked, and what it made
    /// is good as well.
    pub(crate) fn missing(&self, host: &mut Kernel, end: LinkName) -> Result<Vec<String>, CniError> {
        let wanted = self.on(host, end)?;
        let upstreams = Self { burst: Burst::AsAsked, ..*self }.shaping(0)?;
        let seen = host.shaping(end)?;
        let mut missing = Vec::new();
        if let Some(bucket) = wanted.ingress
            && !fits(seen.ingress, &bucket, upstreams.ingress)
        {
            missing.push(format!("tc qdisc replace dev {end} root handle 1: {bucket}"));
        }
        if let Some(bucket) = wanted.egress {
            match seen.egress {
                None => missing
                    .push(format!("what comes in by {end} is sent through no interface with `{bucket}`")),
                Some((funnel, seen)) if !fits(seen, &bucket, upstreams.egress) => {
                    missing.push(format!("tc qdisc replace dev {funnel} root handle 1: {bucket}"));
                }
                Some(_) => {}
            }
        }
        Ok(missing)
    }
}

fn fits(seen: Option<SeenBucket>, wanted: &Bucket, upstreams: Option<Bucket>) -> bool {
    seen.is_some_and(|seen| seen.is(wanted) || upstreams.is_some_and(|bucket| seen.is(&bucket)))
}

fn amount(from: &Object, place: &str, key: &str) -> Result<u64, CniError> {
    asked(from, key).map_or(Ok(0), |value| number(value, &format!("{place}{key}")))
}

fn funnel(network: &str, owner: &Attachment) -> Result<Funnel, CniError> {
    Funnel::of(network, owner).map_err(|error| CniError::config(error.to_string()))
}

/// Takes away what an attachment's packets were sent through. What hangs on the host's end of its interface goes with that.
pub(crate) fn take_off(host: &mut Kernel, network: &str, owner: &Attachment) -> Result<(), CniError> {
    host.remove_funnels(&funnel(network, owner)?)?;
    Ok(())
}

/// Takes away what belongs to none of a network's attachments. Goes on after a failure, and names them all.
pub(crate) fn collect(
    host: &mut Kernel,
    network: &str,
    valid: &[Attachment],
) -> Result<Vec<String>, CniError> {
    let marks: Vec<String> = valid
        .iter()
        .map(|owner| funnel(network, owner).map(|funnel| funnel.alias))
        .collect::<Result<_, _>>()?;
    let mut failed = Vec::new();
    for (name, mark) in host.funnels(&Funnel::mark(network))? {
        if !marks.contains(&mark)
            && let Err(error) = host.delete_link(name)
        {
            failed.push(format!("{name}: {}", CniError::from(error)));
        }
    }
    Ok(failed)
}

/// Does what the call asks for, behind a plugin that made the interface.
pub(crate) fn run(call: &Call, conf: &Conf) -> Result<Answer, CniError> {
    match call.verb {
        Verb::Add => add(call, conf),
        Verb::Del => {
            take_off(&mut Kernel::open()?, &conf.name, &call.attachment()?)?;
            Ok(Answer::Nothing)
        }
        Verb::Check => {
            let Some(limits) = Limits::read(conf)? else { return Ok(Answer::Nothing) };
            previous::required(conf)?;
            let mut host = Kernel::open()?;
            let end = host_end(call, &mut host)?;
            match limits.missing(&mut host, end)? {
                missing if missing.is_empty() => Ok(Answer::Nothing),
                missing => Err(drift(missing.join("; "))),
            }
        }
        Verb::Gc => {
            let Some(valid) = &conf.valid else { return Ok(Answer::Nothing) };
            match collect(&mut Kernel::open()?, &conf.name, valid)? {
                failed if failed.is_empty() => Ok(Answer::Nothing),
                failed => Err(CniError::leftover(failed.join("; "))),
            }
        }
        Verb::Status => Limits::read(conf).map(|_| Answer::Nothing),
    }
}

fn add(call: &Call, conf: &Conf) -> Result<Answer, CniError> {
    let limits = Limits::read(conf)?;
    let mut result = previous::required(conf)?;
    if let Some(limits) = limits {
        let mut host = Kernel::open()?;
        let end = host_end(call, &mut host)?;
        if let Some(funnel) = limits.put_on(&mut host, end, &conf.name, &call.attachment()?)? {
            describe(&mut result, conf.version, &funnel);
        }
    }
    Ok(Answer::Value(Value::Object(result)))
}

/// Upstream's plugin adds the interface to the result.
fn describe(result: &mut Object, version: Version, funnel: &MadeFunnel) {
    if version < Version::V0_3_0 {
        return;
    }
    let mut interface = json!({ "name": funnel.name.as_str() });
    if let Some(mac) = funnel.mac {
        interface["mac"] = json!(mac.to_string());
    }
    if let Some(Value::Array(interfaces)) = result.get_mut("interfaces") {
        interfaces.push(interface);
    }
}

/// The host's end of the container's interface, as the kernel knows it.
pub(crate) fn host_end(call: &Call, host: &mut Kernel) -> Result<LinkName, CniError> {
    let link = call.link()?;
    let mut inside = Kernel::open_inside(sandbox::open(call)?)?;
    let none = |what: &str| CniError::config(format!("the container's interface {link} {what}"));
    let device = inside.device(link)?.ok_or_else(|| none("does not exist"))?;
    host.other_end(&device)?
        .ok_or_else(|| none("is not the end of a veth pair whose other end is on the host"))
}

fn no_end(end: LinkName) -> CniError {
    CniError::config(format!("there is no interface {end} on the host"))
}

impl From<ShapingError> for CniError {
    fn from(error: ShapingError) -> Self {
        Self::config(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(value: Value) -> Result<Option<Limits>, CniError> {
        Limits::read(&Conf::parse(value.to_string().as_bytes()).unwrap())
    }

    #[test]
    fn limits_come_from_the_runtime_unless_the_configuration_has_some() {
        let containerd = json!({ "IngressRate": 10_000_000, "IngressBurst": 4_294_967_295_u64,
                                 "EgressRate": 20_000_000, "EgressBurst": 4_294_967_295_u64 });
        let both =
            read(json!({ "name": "n", "runtimeConfig": { "bandwidth": containerd } })).unwrap().unwrap();
        assert_eq!(both.ingress, Asked { rate: 10_000_000, burst: 4_294_967_295 });
        assert_eq!(both.egress.rate, 20_000_000);
        let fixed = read(json!({ "name": "n", "ingressRate": 8000, "ingressBurst": 8000,
                                 "runtimeConfig": { "bandwidth": containerd } }));
        let fixed = fixed.unwrap().unwrap();
        assert_eq!((fixed.ingress.rate, fixed.egress.rate, fixed.burst), (8000, 0, Burst::Sane));
        let as_asked =
            read(json!({ "name": "n", "burst": "as-asked", "ingressRate": 8000, "ingressBurst": 8000 }));
        assert_eq!(as_asked.unwrap().unwrap().burst, Burst::AsAsked);
    }

    #[test]
    fn nothing_asked_is_no_limit() {
        for none in [
            json!({ "name": "n" }),
            json!({ "name": "n", "runtimeConfig": { "bandwidth": {} } }),
            json!({ "name": "n", "ingressRate": 0, "ingressBurst": 0 }),
            json!({ "name": "n", "runtimeConfig": { "bandwidth": null } }),
        ] {
            assert_eq!(read(none.clone()).unwrap(), None, "{none}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_code() {
        for (wrong, code, part) in [
            (json!({ "name": "n", "ingressRate": 8000 }), 7, "if rate is set, burst must also be set"),
            (json!({ "name": "n", "egressBurst": 8000 }), 7, "if burst is set, rate must also be set"),
            (json!({ "name": "n", "ingressRate": -1, "ingressBurst": 1 }), 6, "ingressRate is -1"),
            (json!({ "name": "n", "ingressRate": "1M", "ingressBurst": 1 }), 6, "ingressRate is \"1M\""),
            (json!({ "name": "n", "burst": "huge" }), 7, "as-asked"),
            (
                json!({ "name": "n", "runtimeConfig": { "bandwidth": { "UnshapedSubnets": ["10.0.0.0/8"] } } }),
                2,
                "unshapedSubnets",
            ),
            (json!({ "name": "n", "shapedSubnets": ["10.0.0.0/8"] }), 2, "shapedSubnets"),
        ] {
            let error = read(wrong).unwrap_err();
            assert!(error.code == code && error.msg.contains(part), "{error}");
        }
    }
}
