//! Shaping of an endpoint at its host's end: a bucket there for what goes to the container, and one on a funnel (`ifb`)
//! that everything from the container is sent through.

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};

use super::link::{self, Request};
use super::netlink::Batch;
use super::{Kernel, io_error, refused, settled, traffic};
use crate::touch::world::WorldError;
use crate::words::addr::Mac;
use crate::words::name::LinkName;
use crate::words::shaping::{Bucket, Funnel, Shaping};

/// A funnel as it was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MadeFunnel {
    /// Its name.
    pub name: LinkName,
    /// Its Ethernet address.
    pub mac: Option<Mac>,
}

/// A bucket as far as the kernel shows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SeenBucket {
    /// In bytes per second.
    pub rate: u64,
    /// In bytes.
    pub limit: u32,
}

impl SeenBucket {
    /// Whether it can be this one.
    pub const fn is(&self, bucket: &Bucket) -> bool {
        self.rate == bucket.rate && self.limit == bucket.limit
    }
}

/// What an endpoint's packets pass now.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SeenShaping {
    /// On the way to the container.
    pub ingress: Option<SeenBucket>,
    /// On the way from the container: the funnel that they are sent through, and its bucket.
    pub egress: Option<(LinkName, Option<SeenBucket>)>,
}

impl Kernel {
    /// Shapes what passes the host's end of an endpoint. Nothing is left behind on failure but perhaps the bucket on that
    /// end, which goes with it. The answer is the funnel, if packets from the container are to be shaped.
    pub fn shape(
        &mut self,
        end: LinkName,
        funnel: &Funnel,
        shaping: &Shaping,
    ) -> Result<Option<MadeFunnel>, WorldError> {
        let action = || format!("shape {end}");
        let asked = [end, funnel.shared_name, funnel.own_name];
        let found = link::by_name(&mut self.socket, &asked).map_err(|e| io_error(action(), e))?;
        let [Some(host_end), shared, own] = <[_; 3]>::try_from(found).unwrap_or_default() else {
            return Err(WorldError::NoLink { action: action(), link: end.to_string() });
        };
        let mut changes = Vec::new();
        changes.extend(shaping.ingress.map(|bucket| traffic::hang(host_end.index, &bucket)));
        let Some(bucket) = shaping.egress else {
            self.carry_out(&action(), &changes)?;
            return Ok(None);
        };
        // Whoever has the name that Go's plugin gives it, unless that is an earlier try of ours, keeps it.
        let free = shared.as_ref().is_none_or(|seen| seen.alias() == Some(&funnel.alias));
        let (name, stale) =
            if free { (funnel.shared_name, shared.is_some()) } else { (funnel.own_name, own.is_some()) };
        let made = self.make_funnel(name, stale, host_end.mtu, &funnel.alias)?;
        changes.extend([
            traffic::hang(made.index, &bucket),
            traffic::open_entrance(host_end.index),
            traffic::redirect(host_end.index, made.index),
        ]);
        match self.carry_out(&action(), &changes) {
            Ok(()) => Ok(Some(MadeFunnel { name, mac: made.mac() })),
            Err(error) => {
                self.delete_link(name)?;
                Err(error)
            }
        }
    }

    fn make_funnel(
        &mut self,
        name: LinkName,
        stale: bool,
        mtu: u32,
        alias: &str,
    ) -> Result<link::Seen, WorldError> {
        let action = || format!("make the interface {name}");
        let mut changes = Vec::new();
        if stale {
            changes.push(link::delete(name));
        }
        changes.extend([create(name, mtu), mark(name, alias)]);
        self.carry_out(&action(), &changes)?;
        let found = link::by_name(&mut self.socket, &[name]).map_err(|e| io_error(action(), e))?;
        let gone = || WorldError::NoLink { action: action(), link: name.to_string() };
        found.into_iter().flatten().next().ok_or_else(gone)
    }

    /// Deletes an attachment's funnels: those that carry its mark, and one without any mark, which Go's plugin made.
    /// False if there was none.
    pub fn remove_funnels(&mut self, funnel: &Funnel) -> Result<bool, WorldError> {
        let failed = |e| io_error(format!("look at the interface {}", funnel.shared_name), e);
        let asked = [funnel.shared_name, funnel.own_name];
        let found = link::by_name(&mut self.socket, &asked).map_err(failed)?;
        let mut any = false;
        for seen in found.into_iter().flatten() {
            if seen.is_funnel() && seen.alias().is_none_or(|alias| alias == funnel.alias) {
                any |= self.delete_link(seen.name)?;
            }
        }
        Ok(any)
    }

    /// Every funnel whose mark begins so, with its mark.
    pub fn funnels(&mut self, mark: &str) -> Result<Vec<(LinkName, String)>, WorldError> {
        let links = settled("look at the interfaces", link::all(&mut self.socket))?;
        let marked = |seen: &link::Seen| {
            let alias = seen.alias().filter(|alias| seen.is_funnel() && alias.starts_with(mark))?;
            Some((seen.name, alias.to_owned()))
        };
        Ok(links.iter().filter_map(marked).collect())
    }

    /// What the packets of an endpoint pass now, seen from its host's end.
    pub fn shaping(&mut self, end: LinkName) -> Result<SeenShaping, WorldError> {
        let action = || format!("look at the shaping of {end}");
        let failed = |e| io_error(action(), e);
        let found = link::by_name(&mut self.socket, &[end]).map_err(failed)?;
        let Some(host_end) = found.into_iter().flatten().next() else {
            return Err(WorldError::NoLink { action: action(), link: end.to_string() });
        };
        let ingress = self.bucket(&action(), host_end.index)?;
        let ways = settled(&action(), traffic::redirections(&mut self.socket, host_end.index))?;
        let through = link::by_index(&mut self.socket, &ways).map_err(failed)?;
        let egress = match through.into_iter().flatten().find(link::Seen::is_funnel) {
            Some(seen) => Some((seen.name, self.bucket(&action(), seen.index)?)),
            None => None,
        };
        Ok(SeenShaping { ingress, egress })
    }

    fn bucket(&mut self, action: &str, index: u32) -> Result<Option<SeenBucket>, WorldError> {
        let seen = traffic::bucket(&mut self.socket, index).map_err(|e| io_error(action, e))?;
        let seen = seen.map_err(|refusal| refused(action, refusal))?;
        Ok(seen.map(|(rate, limit)| SeenBucket { rate, limit }))
    }

    /// Takes the shaping off an endpoint that stays.
    pub fn unshape(&mut self, end: LinkName, funnel: &Funnel) -> Result<(), WorldError> {
        let action = || format!("take the shaping off {end}");
        let found = link::by_name(&mut self.socket, &[end]).map_err(|e| io_error(action(), e))?;
        if let Some(host_end) = found.into_iter().flatten().next() {
            let seen = self.shaping(end)?;
            let mut changes = Vec::new();
            changes.extend(seen.ingress.map(|_| traffic::take_down(host_end.index)));
            changes.extend(seen.egress.map(|_| traffic::close_entrance(host_end.index)));
            self.carry_out(&action(), &changes)?;
        }
        self.remove_funnels(funnel).map(drop)
    }

    /// Sends changes together. The first that is refused is the error.
    fn carry_out(&mut self, action: &str, changes: &[Request]) -> Result<(), WorldError> {
        let mut batch = Batch::default();
        changes.iter().for_each(|(message, flags)| batch.push(message, *flags));
        let refusals = self.socket.write(&mut batch).map_err(|e| io_error(action, e))?;
        match refusals.into_iter().next() {
            None => Ok(()),
            Some((_, refusal)) => Err(refused(action, refusal)),
        }
    }
}

fn create(name: LinkName, mtu: u32) -> Request {
    let mut message = LinkMessage::default();
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    message.attributes = vec![
        LinkAttribute::IfName(name.to_string()),
        LinkAttribute::Mtu(mtu),
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Ifb)]),
    ];
    (RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)
}

/// The kernel takes an alias only for an interface that exists.
fn mark(name: LinkName, alias: &str) -> Request {
    let mut message = LinkMessage::default();
    message.attributes =
        vec![LinkAttribute::IfName(name.to_string()), LinkAttribute::IfAlias(alias.to_owned())];
    (RouteNetlinkMessage::SetLink(message), 0)
}
