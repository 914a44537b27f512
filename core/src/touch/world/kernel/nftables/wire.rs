//! NETLINK_NETFILTER as bytes: attributes, one request, a dump, a transaction.
//!
//! The kernel answers every request before the send returns, so nothing is ever waited for, and a transaction
//! (net/netfilter/nfnetlink.c `nfnetlink_rcv_batch`) happens as a whole or not at all.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, getsockname, recv, send,
    setsockopt, socket, sockopt,
};

use crate::touch::world::WorldError;

/// Subsystem of nf_tables (uapi/linux/netfilter/nfnetlink.h).
const SUBSYSTEM: u16 = 10;
/// Control messages that enclose a transaction.
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
/// Attribute of BATCH_BEGIN: refuse the transaction if the rules have another generation by now.
const BATCH_GENERATION: u16 = 1;
/// Attribute of a generation message.
const GENERATION_ID: u16 = 1;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const REQUEST: u16 = 0x1;
const ACK: u16 = 0x4;
const DUMP: u16 = 0x300;
const DUMP_INTERRUPTED: u16 = 0x10;

/// Make it if it is not there.
pub(super) const CREATE: u16 = 0x400;
/// Only if it is not there (NLM_F_EXCL).
pub(super) const NEW: u16 = 0x200;
/// Behind the others of its kind.
pub(super) const APPEND: u16 = 0x800;

/// Kinds of message (uapi/linux/netfilter/nf_tables.h `nf_tables_msg_types`).
pub(super) mod kind {
    pub(in super::super) const NEW_TABLE: u8 = 0;
    pub(in super::super) const GET_TABLE: u8 = 1;
    pub(in super::super) const DELETE_TABLE: u8 = 2;
    pub(in super::super) const NEW_CHAIN: u8 = 3;
    pub(in super::super) const GET_CHAIN: u8 = 4;
    pub(in super::super) const DELETE_CHAIN: u8 = 5;
    pub(in super::super) const NEW_RULE: u8 = 6;
    pub(in super::super) const GET_RULE: u8 = 7;
    pub(in super::super) const DELETE_RULE: u8 = 8;
    pub(in super::super) const NEW_SET: u8 = 9;
    pub(in super::super) const GET_SET: u8 = 10;
    pub(in super::super) const DELETE_SET: u8 = 11;
    pub(in super::super) const NEW_ELEMENTS: u8 = 12;
    pub(in super::super) const GET_ELEMENTS: u8 = 13;
    pub(in super::super) const DELETE_ELEMENTS: u8 = 14;
    pub(in super::super) const GET_GENERATION: u8 = 16;
}

/// Bytes before the attributes of a message: the netlink header and the netfilter one (family, version, resource).
const HEADER: usize = 16 + 4;
/// Dumps come in pieces of at most 32 KiB (net/netlink/af_netlink.c `netlink_dump`); a refusal carries its request, whose
/// largest nested attribute is 64 KiB.
const BUFFER: usize = 128 * 1024;
/// A dump that others keep disturbing is started anew this often.
const DUMP_TRIES_MAX: usize = 8;
/// The kernel answers at once; this only keeps a kernel bug from hanging us.
const PATIENCE_SECONDS: i64 = 5;

/// Attributes being written.
#[derive(Default)]
pub(super) struct Attributes(Vec<u8>);

impl Attributes {
    /// An attribute with this value.
    pub(super) fn bytes(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        self.0.extend_from_slice(&(value.len() as u16 + 4).to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// A text, with the final NUL that nf_tables wants.
    pub(super) fn text(&mut self, kind: u16, value: &str) -> &mut Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.bytes(kind, &bytes)
    }

    /// A number; nf_tables has them in network order.
    pub(super) fn number(&mut self, kind: u16, value: u32) -> &mut Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    /// A long number.
    pub(super) fn long(&mut self, kind: u16, value: u64) -> &mut Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    /// An attribute that holds attributes; together at most 65,531 bytes.
    pub(super) fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) -> &mut Self {
        const NESTED: u16 = 0x8000;
        let start = self.0.len();
        self.0.extend_from_slice(&[0; 2]);
        self.0.extend_from_slice(&(kind | NESTED).to_ne_bytes());
        fill(self);
        let length = (self.0.len() - start) as u16;
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self
    }

    /// Attributes that were written apart.
    pub(super) fn append(&mut self, written: &[u8]) -> &mut Self {
        self.0.extend_from_slice(written);
        self
    }

    /// The bytes so far.
    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// The attributes in `bytes` as kind and value; stops at the first that is cut off.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    const KIND: u16 = 0x3fff;
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let kind = u16::from_ne_bytes([*bytes.get(2)?, *bytes.get(3)?]);
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind & KIND, value))
    })
}

/// The first attribute of a kind.
pub(super) fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(found, _)| *found == kind).map(|(_, value)| value)
}

/// The same as a number.
pub(super) fn number(bytes: &[u8], kind: u16) -> Option<u32> {
    Some(u32::from_be_bytes(attribute(bytes, kind)?.try_into().ok()?))
}

/// The same as a long number.
pub(super) fn long(bytes: &[u8], kind: u16) -> Option<u64> {
    Some(u64::from_be_bytes(attribute(bytes, kind)?.try_into().ok()?))
}

/// The same as text.
pub(super) fn text(bytes: &[u8], kind: u16) -> Option<&str> {
    let value = attribute(bytes, kind)?;
    std::str::from_utf8(value.strip_suffix(&[0]).unwrap_or(value)).ok()
}

fn message(kind: u16, flags: u16, sequence: u32, family: u8, resource: u16, attributes: &[u8]) -> Vec<u8> {
    let length = HEADER + attributes.len();
    let mut bytes = Vec::with_capacity(length);
    bytes.extend_from_slice(&(length as u32).to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(&(flags | REQUEST).to_ne_bytes());
    bytes.extend_from_slice(&sequence.to_ne_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&[family, 0]);
    bytes.extend_from_slice(&resource.to_be_bytes());
    bytes.extend_from_slice(attributes);
    bytes
}

const fn of_subsystem(kind: u8) -> u16 {
    (SUBSYSTEM << 8) | kind as u16
}

/// A transaction being written.
pub(super) struct Batch {
    bytes: Vec<u8>,
    /// What each message does, for the error that names it. The sequence number of a message is its place in here plus 1.
    steps: Vec<String>,
    /// Where the last message begins.
    last: usize,
}

impl Batch {
    /// An empty one. With a generation, it is refused (ERESTART) once the rules are no longer those we looked at.
    pub(super) fn new(generation: Option<u32>) -> Self {
        let mut attributes = Attributes::default();
        if let Some(generation) = generation {
            attributes.number(BATCH_GENERATION, generation);
        }
        let bytes = message(BATCH_BEGIN, 0, 0, 0, SUBSYSTEM, attributes.as_bytes());
        Self { bytes, steps: Vec::new(), last: 0 }
    }

    /// The same, refused once the rules are no longer those of this generation.
    pub(super) fn unless_changed_since(mut self, generation: u32) -> Self {
        let mut attributes = Attributes::default();
        attributes.number(BATCH_GENERATION, generation);
        let begin = message(BATCH_BEGIN, 0, 0, 0, SUBSYSTEM, attributes.as_bytes());
        if !self.steps.is_empty() {
            self.last += begin.len() - HEADER;
        }
        // It was made without one.
        self.bytes.splice(..HEADER, begin);
        self
    }

    /// One more message; `step` says what it does, like `write chain forward`.
    pub(super) fn step(
        &mut self,
        step: impl Into<String>,
        (kind, flags): (u8, u16),
        family: u8,
        fill: impl FnOnce(&mut Attributes),
    ) {
        let mut attributes = Attributes::default();
        fill(&mut attributes);
        self.last = self.bytes.len();
        self.steps.push(step.into());
        let sequence = self.steps.len() as u32;
        self.bytes.extend(message(of_subsystem(kind), flags, sequence, family, 0, attributes.as_bytes()));
    }

    /// Messages so far.
    pub(super) fn len(&self) -> usize {
        self.steps.len()
    }

    /// Whether it would change nothing.
    pub(super) fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Bytes to send. The last message is to be acknowledged: the end of a batch is so only since Linux 6.10.
    fn finish(&mut self) -> &[u8] {
        let flags = self.last + 6;
        if let Some(bytes) = self.bytes.get_mut(flags..).and_then(<[u8]>::first_chunk_mut) {
            *bytes = (u16::from_ne_bytes(*bytes) | ACK).to_ne_bytes();
        }
        self.bytes.extend(message(BATCH_END, 0, self.steps.len() as u32 + 1, 0, SUBSYSTEM, &[]));
        &self.bytes
    }
}

/// One answer of the kernel.
struct Answer<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    payload: &'a [u8],
}

impl Answer<'_> {
    /// The errno of a refusal, 0 for an acknowledgement.
    fn errno(&self) -> i32 {
        self.payload.first_chunk().map_or(libc::EBADMSG, |code| -i32::from_ne_bytes(*code))
    }

    /// What follows the netfilter header.
    fn attributes(&self) -> &[u8] {
        self.payload.get(4..).unwrap_or_default()
    }
}

fn answers(mut bytes: &[u8]) -> impl Iterator<Item = Answer<'_>> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
        let header: &[u8; 16] = bytes.first_chunk()?;
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        let flags = u16::from_ne_bytes([header[6], header[7]]);
        let sequence = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]);
        // A refusal that carries a long request may be cut off behind its errno.
        let payload = bytes.get(16..length.min(bytes.len()))?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Answer { kind, flags, sequence, payload })
    })
}

/// A socket to nf_tables of the namespace it was opened in.
pub(super) struct Socket {
    fd: OwnedFd,
    subsystem: u16,
    sequence: u32,
    buffer: Vec<u8>,
    /// Room for one message in the kernel's send queue.
    room: usize,
}

impl Socket {
    /// In the namespace of the calling thread.
    pub(super) fn open() -> Result<Self, WorldError> {
        Self::open_to(SUBSYSTEM)
    }

    /// The same, for another part of netfilter.
    pub(super) fn open_to(subsystem: u16) -> Result<Self, WorldError> {
        let open = || -> nix::Result<OwnedFd> {
            let fd = socket(
                AddressFamily::Netlink,
                SockType::Raw,
                SockFlag::SOCK_CLOEXEC,
                SockProtocol::NetlinkNetFilter,
            )?;
            bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
            let patience = nix::sys::time::TimeVal::new(PATIENCE_SECONDS, 0);
            setsockopt(&fd, sockopt::ReceiveTimeout, &patience)?;
            Ok(fd)
        };
        let fd = open().map_err(|errno| WorldError::Io {
            action: "open a netfilter socket".to_owned(),
            source: errno.into(),
        })?;
        Ok(Self { fd, subsystem, sequence: 0, buffer: vec![0; BUFFER], room: 0 })
    }

    /// The number that the kernel gave it.
    pub(super) fn number(&self) -> u32 {
        getsockname::<NetlinkAddr>(self.fd.as_raw_fd()).map_or(0, |address| address.pid())
    }

    /// The number of the rule set: it changes with every transaction of anybody in this namespace.
    pub(super) fn generation(&mut self) -> Result<u32, WorldError> {
        let what = "read the generation of the nftables rules";
        let found = self.get(what, kind::GET_GENERATION, 0, &Attributes::default())?;
        found.and_then(|bytes| number(&bytes, GENERATION_ID)).ok_or_else(|| garbled(what))
    }

    /// The attributes of one object, or none if it does not exist.
    pub(super) fn get(
        &mut self,
        what: &str,
        kind: u8,
        family: u8,
        attributes: &Attributes,
    ) -> Result<Option<Vec<u8>>, WorldError> {
        let sequence = self.request(what, kind, 0, family, attributes)?;
        loop {
            let length = self.receive(what, MsgFlags::empty())?;
            if let Some(answer) = answers(&self.buffer[..length]).find(|answer| answer.sequence == sequence) {
                return match answer.kind {
                    NLMSG_ERROR if answer.errno() == libc::ENOENT => Ok(None),
                    NLMSG_ERROR => Err(refused(what, answer.errno())),
                    _ => Ok(Some(answer.attributes().to_vec())),
                };
            }
        }
    }

    /// Has one thing done; that what should go is gone is no failure.
    pub(super) fn tell(
        &mut self,
        what: &str,
        kind: u8,
        family: u8,
        attributes: &Attributes,
    ) -> Result<(), WorldError> {
        let sequence = self.request(what, kind, ACK, family, attributes)?;
        loop {
            let length = self.receive(what, MsgFlags::empty())?;
            if let Some(answer) = answers(&self.buffer[..length]).find(|answer| answer.sequence == sequence) {
                return match answer.errno() {
                    0 | libc::ENOENT => Ok(()),
                    errno => Err(refused(what, errno)),
                };
            }
        }
    }

    /// The attributes of every object asked for; none if what they would be in does not exist.
    pub(super) fn dump(
        &mut self,
        what: &str,
        kind: u8,
        family: u8,
        attributes: &Attributes,
    ) -> Result<Vec<Vec<u8>>, WorldError> {
        for _ in 0..DUMP_TRIES_MAX {
            let sequence = self.request(what, kind, DUMP, family, attributes)?;
            if let Some(found) = self.collect(what, sequence)? {
                return Ok(found);
            }
        }
        // Others write rules faster than we can read them.
        Err(refused(what, libc::EINTR))
    }

    /// The rest of a dump; none if it was interrupted.
    fn collect(&mut self, what: &str, sequence: u32) -> Result<Option<Vec<Vec<u8>>>, WorldError> {
        let mut found = Vec::new();
        let mut interrupted = false;
        loop {
            let length = self.receive(what, MsgFlags::empty())?;
            for answer in answers(&self.buffer[..length]).filter(|answer| answer.sequence == sequence) {
                interrupted |= answer.flags & DUMP_INTERRUPTED != 0;
                match answer.kind {
                    // NLMSG_DONE carries the errno of a dump that failed half-way.
                    NLMSG_DONE | NLMSG_ERROR => match answer.errno() {
                        0 if interrupted => return Ok(None),
                        0 => return Ok(Some(found)),
                        libc::ENOENT => return Ok(Some(Vec::new())),
                        libc::EINTR | libc::EAGAIN => return Ok(None),
                        errno => return Err(refused(what, errno)),
                    },
                    _ => found.push(answer.attributes().to_vec()),
                }
            }
        }
    }

    /// Makes the transaction happen, or says which step the kernel refused; then nothing has happened.
    pub(super) fn commit(&mut self, mut batch: Batch) -> Result<(), WorldError> {
        if batch.is_empty() {
            return Ok(());
        }
        let what = "commit an nftables transaction";
        self.drain()?;
        let length = batch.finish().len();
        self.make_room(length);
        self.transmit(what, &batch.bytes)?;
        // Everything the kernel has to say is in the queue now.
        let mut acknowledged = false;
        let mut refusal: Option<WorldError> = None;
        while let Some(length) = self.receive_now(what)? {
            for answer in answers(&self.buffer[..length]).filter(|answer| answer.kind == NLMSG_ERROR) {
                if answer.errno() == 0 {
                    acknowledged |= answer.sequence as usize == batch.steps.len();
                } else if refusal.is_none() {
                    let step = (answer.sequence as usize).checked_sub(1).and_then(|n| batch.steps.get(n));
                    refusal = Some(refused(step.map_or(what, String::as_str), answer.errno()));
                }
            }
        }
        match refusal {
            Some(refusal) => Err(refusal),
            None if acknowledged => Ok(()),
            None => Err(garbled(what)),
        }
    }

    fn request(
        &mut self,
        what: &str,
        kind: u8,
        flags: u16,
        family: u8,
        attributes: &Attributes,
    ) -> Result<u32, WorldError> {
        self.sequence = self.sequence.wrapping_add(1);
        let kind = (self.subsystem << 8) | u16::from(kind);
        let bytes = message(kind, flags, self.sequence, family, 0, attributes.as_bytes());
        self.transmit(what, &bytes)?;
        Ok(self.sequence)
    }

    fn transmit(&self, what: &str, bytes: &[u8]) -> Result<(), WorldError> {
        send(self.fd.as_raw_fd(), bytes, MsgFlags::empty())
            .map(drop)
            .map_err(|errno| refused(what, errno as i32))
    }

    fn receive(&mut self, what: &str, flags: MsgFlags) -> Result<usize, WorldError> {
        loop {
            match recv(self.fd.as_raw_fd(), &mut self.buffer, flags) {
                Err(Errno::EINTR) => {}
                other => return other.map_err(|errno| refused(what, errno as i32)),
            }
        }
    }

    fn receive_now(&mut self, what: &str) -> Result<Option<usize>, WorldError> {
        match self.receive(what, MsgFlags::MSG_DONTWAIT) {
            Ok(length) => Ok(Some(length)),
            Err(error) if error_code(&error) == Some(libc::EAGAIN) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Throws away what an earlier request that failed half-way may have left.
    fn drain(&mut self) -> Result<(), WorldError> {
        while self.receive_now("read a netfilter socket")?.is_some() {}
        Ok(())
    }

    /// A transaction is one datagram, however large: net/netlink/af_netlink.c `netlink_sendmsg` wants it to fit the send
    /// buffer, whose default is some 200 KiB.
    fn make_room(&mut self, length: usize) {
        const DEFAULT: usize = 64 * 1024;
        let wanted = length + 1024;
        if wanted > self.room.max(DEFAULT) {
            // Forced with CAP_NET_ADMIN; else as much as the host allows, and the send says so if that is too little.
            if setsockopt(&self.fd, sockopt::SndBufForce, &wanted).is_err() {
                let _ = setsockopt(&self.fd, sockopt::SndBuf, &wanted);
            }
            self.room = wanted;
        }
    }
}

fn refused(what: &str, errno: i32) -> WorldError {
    WorldError::Refused { action: what.to_owned(), detail: None, source: io::Error::from_raw_os_error(errno) }
}

fn garbled(what: &str) -> WorldError {
    let source = io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer was not understood");
    WorldError::Io { action: what.to_owned(), source }
}

/// The errno in an error, if it has one.
pub(super) fn error_code(error: &WorldError) -> Option<i32> {
    match error {
        WorldError::Io { source, .. } | WorldError::Refused { source, .. } => source.raw_os_error(),
        WorldError::NoLink { .. } | WorldError::Unsupported { .. } => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_read_as_written() {
        let mut out = Attributes::default();
        out.text(1, "ab").nest(2, |inner| {
            inner.number(3, 7).long(4, 9);
        });
        assert_eq!(out.as_bytes().len() % 4, 0);
        assert_eq!(text(out.as_bytes(), 1), Some("ab"));
        let inner = attribute(out.as_bytes(), 2).unwrap();
        assert_eq!((number(inner, 3), long(inner, 4), number(inner, 5)), (Some(7), Some(9), None));
    }

    #[test]
    fn cut_off_bytes_end_the_reading() {
        let mut out = Attributes::default();
        out.number(1, 1).number(2, 2);
        for length in 0..out.as_bytes().len() {
            let whole = attributes(&out.as_bytes()[..length]).count();
            assert_eq!(whole, length / 8, "{length}");
        }
        assert_eq!(attributes(&[0, 0, 0, 0, 1, 2, 3, 4]).count(), 0, "a length below the header's");
        assert_eq!(answers(&[0; 15]).count(), 0);
        assert_eq!(answers(&[0; 16]).count(), 0, "no progress is no message");
    }
}
