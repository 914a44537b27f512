//! Traffic control: the messages that hang a token bucket on an interface and send what enters one interface through
//! another, and what the kernel says about them (uapi/linux/rtnetlink.h, pkt_sched.h, pkt_cls.h).

use std::io;

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_ECHO, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcHeader, TcMessage};

use super::link::Request;
use super::netlink::{Refusal, Socket, attributes, text_of, u32_at};
use crate::words::shaping::Bucket;

/// `struct tcmsg`
const HEADER: usize = 20;
const RTM_NEWQDISC: u16 = 36;
const RTM_NEWTFILTER: u16 = 44;
/// Attributes of every message...
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
/// ...of a token bucket...
const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;
/// ...of filters...
const TCA_U32_SEL: u16 = 5;
const TCA_U32_ACT: u16 = 7;
const TCA_MATCHALL_ACT: u16 = 2;
/// ...and of actions.
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
const TCA_MIRRED_PARMS: u16 = 2;

const TC_LINKLAYER_ETHERNET: u8 = 1;
const TC_U32_TERMINAL: u8 = 1;
const TC_ACT_STOLEN: i32 = 4;
const TCA_EGRESS_REDIR: i32 = 1;
/// Where `ifindex` is in `struct tc_mirred`.
const MIRRED_IFINDEX: usize = 24;
/// Bits of the priority in `tcm_info`; below them is the protocol, in network order.
const PRIORITY_SHIFT: u32 = 16;

/// `1:`, as upstream calls it.
const BUCKET: TcHandle = TcHandle { major: 1, minor: 0 };
/// `ffff:`
const ENTRANCE: TcHandle = TcHandle { major: 0xffff, minor: 0 };

/// Hangs a bucket on an interface, instead of whatever its packets waited in.
pub(super) fn hang(index: u32, bucket: &Bucket) -> Request {
    let mut options = Vec::new();
    put(&mut options, TCA_TBF_PARMS, &parameters(bucket));
    if u32::try_from(bucket.rate).is_err() {
        put(&mut options, TCA_TBF_RATE64, &bucket.rate.to_ne_bytes());
    }
    put(&mut options, TCA_TBF_BURST, &bucket.burst.to_ne_bytes());
    let message = about(index, BUCKET, TcHandle::ROOT, 0, Some(("tbf", options)));
    (RouteNetlinkMessage::NewQueueDiscipline(message), NLM_F_CREATE | NLM_F_REPLACE)
}

/// `struct tc_tbf_qopt`. The kernel has Ethernet's overhead in its count and needs no rate table for that link layer; the
/// time to fill the bucket is for kernels that do not know TCA_TBF_BURST (before Linux 3.13), and so ends at what 32 bits
/// of ticks can say.
fn parameters(bucket: &Bucket) -> Vec<u8> {
    const RATESPEC: usize = 12;
    const TICK_NS: u128 = 64;
    let ticks = u128::from(bucket.burst) * 1_000_000_000 / u128::from(bucket.rate.max(1)) / TICK_NS;
    let mut bytes = vec![0, TC_LINKLAYER_ETHERNET];
    bytes.resize(RATESPEC - 4, 0);
    bytes.extend_from_slice(&u32::try_from(bucket.rate).unwrap_or(u32::MAX).to_ne_bytes());
    // No peak rate.
    bytes.resize(2 * RATESPEC, 0);
    bytes.extend_from_slice(&bucket.limit.to_ne_bytes());
    bytes.extend_from_slice(&u32::try_from(ticks).unwrap_or(u32::MAX).to_ne_bytes());
    bytes.extend_from_slice(&0u32.to_ne_bytes());
    bytes
}

/// Takes the bucket off an interface.
pub(super) fn take_down(index: u32) -> Request {
    (RouteNetlinkMessage::DelQueueDiscipline(about(index, BUCKET, TcHandle::ROOT, 0, None)), 0)
}

/// Lets filters see what enters an interface.
pub(super) fn open_entrance(index: u32) -> Request {
    let message = about(index, ENTRANCE, TcHandle::INGRESS, 0, Some(("ingress", Vec::new())));
    (RouteNetlinkMessage::NewQueueDiscipline(message), NLM_F_CREATE | NLM_F_EXCL)
}

/// Takes the filters away with what let them see.
pub(super) fn close_entrance(index: u32) -> Request {
    let message = about(index, ENTRANCE, TcHandle::INGRESS, 0, None);
    (RouteNetlinkMessage::DelQueueDiscipline(message), 0)
}

/// Sends everything that enters one interface out through another. The filter is the one that upstream uses (`u32` with a
/// key that every packet has), so whatever kernel upstream's plugin worked on has it.
pub(super) fn redirect(index: u32, to: u32) -> Request {
    let mut mirred = [0, 0, TC_ACT_STOLEN, 0, 0, TCA_EGRESS_REDIR].map(i32::to_ne_bytes).concat();
    mirred.extend_from_slice(&to.to_ne_bytes());
    let mut action = Vec::new();
    put(&mut action, TCA_ACT_KIND, b"mirred\0");
    put(&mut action, TCA_ACT_OPTIONS, &nested(TCA_MIRRED_PARMS, &mirred));
    // `struct tc_u32_sel` with one `tc_u32_key`, all zero: nothing is looked at.
    let mut selector = vec![TC_U32_TERMINAL, 0, 1];
    selector.resize(16 + 16, 0);
    let mut options = Vec::new();
    put(&mut options, TCA_U32_SEL, &selector);
    put(&mut options, TCA_U32_ACT, &nested(1, &action));
    let every = u32::from((libc::ETH_P_ALL as u16).to_be());
    let message =
        about(index, TcHandle::UNSPEC, ENTRANCE, (1 << PRIORITY_SHIFT) | every, Some(("u32", options)));
    (RouteNetlinkMessage::NewTrafficFilter(message), NLM_F_CREATE | NLM_F_EXCL)
}

/// Rate (bytes per second) and limit (bytes) of the bucket on an interface. The kernel shows the burst only as the time to
/// fill it, cut off at 32 bits of ticks.
pub(super) fn bucket(socket: &mut Socket, index: u32) -> io::Result<Result<Option<(u64, u32)>, Refusal>> {
    let question =
        RouteNetlinkMessage::GetQueueDiscipline(about(index, TcHandle::UNSPEC, TcHandle::ROOT, 0, None));
    // Without NLM_F_ECHO the kernel tells only those who listen for changes.
    let answers = socket.ask_with(&[question], NLM_F_ECHO, |kind, body| {
        (kind == RTM_NEWQDISC).then(|| read_bucket(body)).flatten()
    })?;
    Ok(answers.into_iter().next().unwrap_or(Ok(None)))
}

fn read_bucket(body: &[u8]) -> Option<(u64, u32)> {
    let options = options(body, "tbf")?;
    let parameters = find(options, TCA_TBF_PARMS)?;
    let (rate, limit) = (u32_at(parameters, 8)?, u32_at(parameters, 24)?);
    let long = find(options, TCA_TBF_RATE64).and_then(|value| value.try_into().ok().map(u64::from_ne_bytes));
    Some((long.unwrap_or_else(|| rate.into()), limit))
}

/// Where filters send what enters an interface.
pub(super) fn redirections(socket: &mut Socket, index: u32) -> io::Result<Result<Vec<u32>, Refusal>> {
    let question = RouteNetlinkMessage::GetTrafficFilter(about(index, TcHandle::UNSPEC, ENTRANCE, 0, None));
    socket.dump(&question, |kind, body| (kind == RTM_NEWTFILTER).then(|| read_redirection(body)).flatten())
}

fn read_redirection(body: &[u8]) -> Option<u32> {
    let actions = match options(body, "u32") {
        Some(options) => find(options, TCA_U32_ACT)?,
        None => find(options(body, "matchall")?, TCA_MATCHALL_ACT)?,
    };
    attributes(actions).find_map(|(_, action)| {
        let kind = find(action, TCA_ACT_KIND)?;
        let parameters = find(find(action, TCA_ACT_OPTIONS)?, TCA_MIRRED_PARMS)?;
        (text_of(kind) == "mirred").then(|| u32_at(parameters, MIRRED_IFINDEX)).flatten()
    })
}

/// The options of a message about something of this kind.
fn options<'a>(body: &'a [u8], kind: &str) -> Option<&'a [u8]> {
    let all = body.get(HEADER..)?;
    (text_of(find(all, TCA_KIND)?) == kind).then(|| find(all, TCA_OPTIONS)).flatten()
}

fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(found, _)| *found == kind).map(|(_, value)| value)
}

fn about(
    index: u32,
    handle: TcHandle,
    parent: TcHandle,
    info: u32,
    kind: Option<(&str, Vec<u8>)>,
) -> TcMessage {
    let header = TcHeader { index: index as i32, handle, parent, info, ..TcHeader::default() };
    let mut attributes = Vec::new();
    if let Some((kind, options)) = kind {
        attributes.push(TcAttribute::Kind(kind.to_owned()));
        attributes.push(TcAttribute::Other(DefaultNla::new(TCA_OPTIONS, options)));
    }
    TcMessage::from_parts(header, attributes)
}

/// Appends an attribute.
fn put(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    out.extend_from_slice(&(value.len() as u16 + 4).to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(value);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// One attribute by itself.
fn nested(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    put(&mut out, kind, value);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `tc qdisc add dev X root tbf rate 20mbit burst 250000 limit 312500`, as iproute2 6.1 has it.
    #[test]
    fn a_bucket_is_read_as_it_is_written() {
        for rate in [2_500_000, u64::from(u32::MAX) + 8] {
            let wanted = Bucket { rate, burst: 250_000, limit: 312_500 };
            let (RouteNetlinkMessage::NewQueueDiscipline(message), _) = hang(7, &wanted) else {
                panic!("another message")
            };
            let mut body = vec![0; netlink_packet_core::Emitable::buffer_len(&message)];
            netlink_packet_core::Emitable::emit(&message, &mut body);
            assert_eq!(read_bucket(&body), Some((rate, 312_500)));
            for cut in 0..body.len() {
                let _ = read_bucket(&body[..cut]);
            }
        }
        assert_eq!(parameters(&Bucket { rate: 2_500_000, burst: 250_000, limit: 1 }).len(), 36);
    }

    #[test]
    fn a_redirection_is_read_as_it_is_written() {
        let (RouteNetlinkMessage::NewTrafficFilter(message), _) = redirect(7, 9) else {
            panic!("another message")
        };
        let mut body = vec![0; netlink_packet_core::Emitable::buffer_len(&message)];
        netlink_packet_core::Emitable::emit(&message, &mut body);
        assert_eq!(read_redirection(&body), Some(9));
        for cut in 0..body.len() {
            let _ = read_redirection(&body[..cut]);
        }
    }
}
