//! Policies of the kernel's IPsec, over NETLINK_XFRM.
//!
//! **Layout** — uapi/linux/xfrm.h: `xfrm_selector` 56 bytes, `xfrm_userpolicy_info` 168, `xfrm_userpolicy_id` 64, `xfrm_user_tmpl` 64;
//! addresses and the SPI in network order, everything else in the machine's.
//! **Ours** — a tunnel of ESP with our reqid, IPv4, about whole subnets and nothing narrower. Whatever differs in that is somebody
//! else's, and is not even seen.

use std::io;
use std::net::{IpAddr, Ipv4Addr};

use netlink_packet_core::NetlinkSerializable;

use super::netlink::{Batch, Refusal, Socket, attributes, u32_at};
use super::{action, io_error, refused};
use crate::touch::world::WorldError;
use crate::words::addr::Prefix;
use crate::words::fact::{Change, Fact, Policy, PolicyDirection};
use crate::words::ipsec::REQID;

const XFRM_MSG_NEWPOLICY: u16 = 0x13;
const XFRM_MSG_DELPOLICY: u16 = 0x14;
const XFRM_MSG_GETPOLICY: u16 = 0x15;
const XFRM_MSG_UPDPOLICY: u16 = 0x19;
const XFRMA_TMPL: u16 = 5;
const XFRMA_POLICY_TYPE: u16 = 16;
const XFRMA_MARK: u16 = 21;
const XFRMA_IF_ID: u16 = 31;

const MODE_TUNNEL: u8 = 1;
const SELECTOR: usize = 56;
const INFO: usize = 168;
const ID: usize = 64;
const TEMPLATE: usize = 64;

/// A request in the kernel's layout.
struct Request {
    kind: u16,
    body: Vec<u8>,
}

impl NetlinkSerializable for Request {
    fn message_type(&self) -> u16 {
        self.kind
    }

    fn buffer_len(&self) -> usize {
        self.body.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.body);
    }
}

/// Every policy that is of our kind.
pub(super) fn dump(socket: &mut Socket) -> io::Result<Result<Vec<Policy>, Refusal>> {
    socket.dump(&Request { kind: XFRM_MSG_GETPOLICY, body: vec![0; ID] }, seen)
}

/// Makes the changes; one answer for each.
pub(super) fn apply(socket: &mut Socket, changes: &[Change<'_>]) -> Vec<Result<(), WorldError>> {
    let mut results: Vec<Result<(), WorldError>> = changes.iter().map(|_| Ok(())).collect();
    let mut batch = Batch::default();
    let mut sent = 0;
    for (place, change) in changes.iter().enumerate() {
        if let Some(request) = request(change) {
            batch.push(&request, 0);
        }
        if socket.is_full(&batch) || place + 1 == changes.len() {
            let (some, answers) = (&changes[sent..=place], &mut results[sent..=place]);
            flush(socket, &mut batch, some, answers);
            sent = place + 1;
        }
    }
    results
}

fn flush(
    socket: &mut Socket,
    batch: &mut Batch,
    changes: &[Change<'_>],
    results: &mut [Result<(), WorldError>],
) {
    match socket.write(batch) {
        Ok(refusals) => {
            for (place, refusal) in refusals {
                let Some((change, result)) = changes.get(place).zip(results.get_mut(place)) else { continue };
                let done = match (change, refusal.errno) {
                    (Change::Delete(_), libc::ENOENT) => true,
                    (Change::Create(Fact::Policy(policy)), libc::EEXIST) => is_there(socket, policy),
                    _ => false,
                };
                if !done {
                    *result = Err(refused(action(change), refusal));
                }
            }
        }
        Err(error) => {
            for (change, result) in changes.iter().zip(results) {
                *result = Err(io_error(action(change), super::again(&error)));
            }
        }
    }
}

/// Whether somebody else was faster, and to the same end.
fn is_there(socket: &mut Socket, policy: &Policy) -> bool {
    matches!(dump(socket), Ok(Ok(found)) if found.contains(policy))
}

/// A policy that is not seen as ours is not replaced: the kernel then says that there is one (EEXIST).
fn request(change: &Change<'_>) -> Option<Request> {
    let Fact::Policy(policy) = change.fact() else { return None };
    Some(match change {
        Change::Create(_) => write(policy, XFRM_MSG_NEWPOLICY),
        Change::Replace { .. } => write(policy, XFRM_MSG_UPDPOLICY),
        Change::Delete(_) => delete(policy),
    })
}

fn write(policy: &Policy, kind: u16) -> Request {
    let mut body = selector(policy);
    body.resize(INFO, 0);
    // No limit of bytes and packets, soft or hard; none of time is 0.
    body[SELECTOR..SELECTOR + 32].fill(0xff);
    body[160] = number(policy.direction);
    body.extend(((4 + TEMPLATE) as u16).to_ne_bytes());
    body.extend(XFRMA_TMPL.to_ne_bytes());
    body.extend(template(policy));
    Request { kind, body }
}

fn delete(policy: &Policy) -> Request {
    let mut body = selector(policy);
    body.resize(ID, 0);
    body[60] = number(policy.direction);
    Request { kind: XFRM_MSG_DELPOLICY, body }
}

fn selector(policy: &Policy) -> Vec<u8> {
    let mut bytes = vec![0; SELECTOR];
    put(&mut bytes, 0, policy.destination.base());
    put(&mut bytes, 16, policy.source.base());
    bytes[40..42].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
    bytes[42] = policy.destination.len();
    bytes[43] = policy.source.len();
    bytes
}

fn template(policy: &Policy) -> [u8; TEMPLATE] {
    let mut bytes = [0; TEMPLATE];
    put(&mut bytes, 0, policy.to.into());
    bytes[20] = libc::IPPROTO_ESP as u8;
    bytes[24..26].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
    put(&mut bytes, 28, policy.from.into());
    bytes[44..48].copy_from_slice(&REQID.to_ne_bytes());
    bytes[48] = MODE_TUNNEL;
    // Whatever algorithms the two ends agree on.
    bytes[52..].fill(0xff);
    bytes
}

fn put(bytes: &mut [u8], at: usize, address: IpAddr) {
    if let IpAddr::V4(v4) = address {
        bytes[at..at + 4].copy_from_slice(&v4.octets());
    }
}

const fn number(direction: PolicyDirection) -> u8 {
    match direction {
        PolicyDirection::In => 0,
        PolicyDirection::Out => 1,
        PolicyDirection::Forward => 2,
    }
}

/// The policy in a message, if it is of our kind.
fn seen(kind: u16, body: &[u8]) -> Option<Policy> {
    let info = body.get(..INFO).filter(|_| kind == XFRM_MSG_NEWPOLICY)?;
    let narrower = info[32..40].iter().chain(&info[44..SELECTOR]).any(|byte| *byte != 0);
    let action = info[161];
    if narrower || action != 0 || info[40..42] != (libc::AF_INET as u16).to_ne_bytes() {
        return None;
    }
    let mut found = None;
    for (kind, value) in attributes(body.get(INFO..)?) {
        match kind {
            XFRMA_TMPL if value.len() == TEMPLATE => found = Some(value),
            XFRMA_POLICY_TYPE if value.first() != Some(&0) => return None,
            XFRMA_TMPL | XFRMA_MARK | XFRMA_IF_ID => return None,
            _ => {}
        }
    }
    let template = found?;
    let ours = template[20] == libc::IPPROTO_ESP as u8
        && u32_at(template, 16) == Some(0)
        && template[24..26] == (libc::AF_INET as u16).to_ne_bytes()
        && u32_at(template, 44) == Some(REQID)
        && template[48] == MODE_TUNNEL
        && template[50] == 0;
    let direction = match info[160] {
        0 => PolicyDirection::In,
        1 => PolicyDirection::Out,
        2 => PolicyDirection::Forward,
        _ => return None,
    };
    let prefix = |at, len| Prefix::new(v4(info, at)?.into(), len).ok();
    ours.then_some(Policy {
        direction,
        source: prefix(16, info[43])?,
        destination: prefix(0, info[42])?,
        from: v4(template, 28)?,
        to: v4(template, 0)?,
    })
}

fn v4(bytes: &[u8], at: usize) -> Option<Ipv4Addr> {
    Some(<[u8; 4]>::try_from(bytes.get(at..at + 4)?).ok()?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(direction: PolicyDirection) -> Policy {
        Policy {
            direction,
            source: "10.100.5.0/24".parse().unwrap(),
            destination: "10.100.9.0/25".parse().unwrap(),
            from: [192, 0, 2, 1].into(),
            to: [192, 0, 2, 9].into(),
        }
    }

    #[test]
    fn what_is_written_is_what_is_seen() {
        for direction in [PolicyDirection::In, PolicyDirection::Out, PolicyDirection::Forward] {
            let request = write(&policy(direction), XFRM_MSG_UPDPOLICY);
            assert_eq!(request.body.len(), INFO + 4 + TEMPLATE);
            assert_eq!(seen(XFRM_MSG_NEWPOLICY, &request.body), Some(policy(direction)));
            assert_eq!(delete(&policy(direction)).body[..SELECTOR], request.body[..SELECTOR]);
        }
    }

    #[test]
    fn policies_of_others_are_not_seen() {
        let ours = write(&policy(PolicyDirection::Out), XFRM_MSG_NEWPOLICY).body;
        let template = INFO + 4;
        let elsewhere = [
            (32, 1, "a port"),
            (44, 6, "a protocol"),
            (48, 3, "an interface"),
            (52, 1, "a user"),
            (40, 10, "another family"),
            (161, 1, "it blocks"),
            (160, 3, "a socket's"),
            (template + 20, 51, "AH"),
            (template + 19, 1, "one SPI only"),
            (template + 44, 12, "another reqid"),
            (template + 48, 0, "transport mode"),
            (template + 50, 1, "optional"),
        ];
        for (at, byte, what) in elsewhere {
            let mut theirs = ours.clone();
            theirs[at] = byte;
            assert_eq!(seen(XFRM_MSG_NEWPOLICY, &theirs), None, "{what}");
        }
        let with = |kind: u16, value: &[u8]| {
            let len = (4 + value.len()) as u16;
            [&ours[..], &len.to_ne_bytes(), &kind.to_ne_bytes(), value].concat()
        };
        assert_eq!(seen(XFRM_MSG_NEWPOLICY, &with(XFRMA_MARK, &[1; 8])), None);
        assert_eq!(seen(XFRM_MSG_NEWPOLICY, &with(XFRMA_IF_ID, &[1; 4])), None);
        assert_eq!(seen(XFRM_MSG_NEWPOLICY, &with(XFRMA_POLICY_TYPE, &[1, 0, 0, 0, 0, 0])), None);
        assert!(seen(XFRM_MSG_NEWPOLICY, &with(XFRMA_POLICY_TYPE, &[0; 6])).is_some());
        assert_eq!(seen(XFRM_MSG_NEWPOLICY, &ours[..INFO]), None);
    }

    #[test]
    fn broken_bytes_are_no_policy() {
        let whole = write(&policy(PolicyDirection::In), XFRM_MSG_NEWPOLICY).body;
        for cut in 0..whole.len() {
            assert_eq!(seen(XFRM_MSG_NEWPOLICY, &whole[..cut]), None);
        }
    }
}
