//! What the plugin `flannel` does beyond a bridge, in the same process: what upstream has plugins of their own for.

use flannel_core::decide::isolation::Policy;
use flannel_core::touch::world::kernel::Kernel;
use flannel_core::words::hostport::CallerMasquerade;
use flannel_core::words::name::Attachment;
use serde_json::Value;

use crate::args::Call;
use crate::bandwidth::{self, Limits};
use crate::conf::Conf;
use crate::firewall;
use crate::json::first_asked;
use crate::ports::{self, Place, PortMappings, Withdrawn};
use crate::previous::Previous;
use crate::result::{Attached, CniError};
use crate::sandbox;
use crate::tuning::Settings;

/// What is asked for; read before anything is made, so that what cannot be read harms nothing.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Extras {
    limits: Option<Limits>,
    ports: PortMappings,
    settings: Settings,
    policy: Option<Policy>,
}

/// What keeps the end of a DEL waiting: closing a socket right after rules were deleted waits for the kernel, and by the time
/// the interface is gone it need not any more.
pub(crate) struct Closing {
    _ports: Option<Withdrawn>,
}

impl Extras {
    pub(crate) fn read(call: &Call, conf: &Conf) -> Result<Self, CniError> {
        Ok(Self {
            limits: Limits::read(conf)?,
            ports: PortMappings::read(&conf.runtime)?,
            settings: Settings::read(conf, call.link()?)?,
            policy: firewall::policy(conf)?,
        })
    }

    /// Where another plugin does the work, only what a plugin behind it can do is done: the rest is not left out in silence.
    pub(crate) fn refuse_beside(delegate: &str, conf: &Conf) -> Result<(), CniError> {
        const OURS: [&str; 6] =
            ["sysctl", "ingressPolicy", "ingressRate", "ingressBurst", "egressRate", "egressBurst"];
        match first_asked(&conf.given, &OURS) {
            None => Ok(()),
            Some(key) => Err(CniError::unsupported(format!(
                "{key} is not supported where delegate.type is {delegate:?}: list tuning, firewall or bandwidth after this plugin"
            ))),
        }
    }

    /// Makes them, in this order; what was made is taken back on failure.
    pub(crate) fn add(&self, call: &Call, conf: &Conf, attached: &Attached) -> Result<(), CniError> {
        let owner = call.attachment()?;
        let [bridge, end, _] = &attached.interfaces;
        if !self.settings.is_empty() {
            self.settings.set(&mut Kernel::open_inside(sandbox::open(call)?)?)?;
        }
        if let Some(policy) = self.policy {
            firewall::isolate(&mut Kernel::open()?, bridge.name, Some(end.name), policy)?;
        }
        if let Some(limits) = &self.limits {
            limits.put_on_new(&mut Kernel::open()?, end.name, &conf.name, &owner)?;
        }
        if self.ports.is_empty() {
            return Ok(());
        }
        let place = Place {
            network: &conf.name,
            owner,
            addresses: attached.addresses.iter().map(|address| address.address).collect(),
            towards: Some(bridge.name),
            host_link: Some(end.name),
        };
        ports::publish(&place, &self.ports, CallerMasquerade::Needed).map_err(|error| {
            let undone = Kernel::open()
                .map_err(CniError::from)
                .and_then(|mut host| bandwidth::take_off(&mut host, &conf.name, &place.owner));
            undone.err().map_or_else(|| error.clone(), |undo| error.but_left(&undo))
        })
    }

    /// Takes back whatever the attachment may have, in the opposite order, before its interface goes.
    pub(crate) fn del(owner: &Attachment, conf: &Conf) -> Result<Closing, CniError> {
        let asked = first_asked(&conf.runtime, &["portMappings"]).is_some();
        let ports = ports::withdraw(&conf.name, owner, asked);
        // Whatever becomes of the ports.
        bandwidth::take_off(&mut Kernel::open()?, &conf.name, owner)?;
        Ok(Closing { _ports: ports? })
    }

    /// What is not as it was made.
    pub(crate) fn check(&self, call: &Call, conf: &Conf) -> Result<Vec<String>, CniError> {
        let mut missing = Vec::new();
        if !self.settings.is_empty() {
            let mut inside = Kernel::open_inside(sandbox::open(call)?)?;
            missing.extend(self.settings.missing(&mut inside)?);
        }
        if let Some(policy) = self.policy
            && let Some(previous) = conf.previous.as_ref().and_then(Previous::read)
        {
            let mut host = Kernel::open()?;
            if let Some(bridge) = firewall::bridge(&mut host, &previous)? {
                missing.extend(firewall::missing(&mut host, bridge, previous.host_veth(), policy)?);
            }
        }
        if let Some(limits) = &self.limits {
            let mut host = Kernel::open()?;
            let end = bandwidth::host_end(call, &mut host)?;
            missing.extend(limits.missing(&mut host, end)?);
        }
        if !self.ports.is_empty() {
            let (link, previous) = (call.link()?, conf.previous.as_ref().unwrap_or(&Value::Null));
            let addresses = Previous::read(previous).map(|previous| previous.addresses(link));
            let place = Place {
                network: &conf.name,
                owner: call.attachment()?,
                addresses: addresses.unwrap_or_default(),
                towards: None,
                host_link: None,
            };
            missing.extend(ports::missing(&place, &self.ports, CallerMasquerade::Needed)?);
        }
        Ok(missing)
    }

    /// Takes back what belongs to none of the attachments.
    pub(crate) fn gc(conf: &Conf, valid: &[Attachment]) -> Result<(), CniError> {
        let mut failed = ports::collect(&conf.name, valid)?;
        failed.extend(bandwidth::collect(&mut Kernel::open()?, &conf.name, valid)?);
        match failed {
            failed if failed.is_empty() => Ok(()),
            failed => Err(CniError::leftover(failed.join("; "))),
        }
    }
}
