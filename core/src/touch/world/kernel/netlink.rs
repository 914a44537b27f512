//! A blocking netlink socket: one question at a time, dumps that are repeated when the kernel says that they are
//! inconsistent, and many changes in one send.
//!
//! The kernel works on rtnetlink requests inside `send` (net/netlink/af_netlink.c `netlink_rcv_skb`), so every answer is
//! queued when it returns; the receive timeout only guards against a kernel that does not answer at all. In a batch only
//! the last message asks for an acknowledgement: a message that failed is answered anyway, with its sequence number.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use netlink_packet_core::{
    NLA_HEADER_SIZE, NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST,
    NetlinkSerializable, NlasIterator,
};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, getsockname, recv, send,
    setsockopt, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use super::netns::Namespace;

/// How often an inconsistent dump is repeated before what it showed is taken as it is: whoever looks applies the
/// difference and looks again, and a host whose routes never rest must not keep us from working.
const DUMP_TRIES_MAX: usize = 4;
/// Bytes in one send. More is not faster (measured 32 KiB to 256 KiB).
const BATCH_BYTES: usize = 32 * 1024;
/// Bytes read at once. The kernel makes its dump messages no larger than 32 KiB.
const READ_BYTES: usize = 64 * 1024;
/// Receive buffer for batches: room for the refusal of every message of one send.
const ROOM_BYTES: usize = 4 << 20;
/// What one refusal takes up in the receive buffer, generously.
const REFUSAL_BYTES: usize = 2048;
/// Questions in one send: their answers fit the buffer that every socket has.
const QUESTIONS_MAX: usize = 16;
/// Longest wait for an answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Reads spent on throwing away what an abandoned exchange left behind.
const DRAIN_MAX: usize = 4096;

const HEADER: usize = 16;
const NLMSG_NOOP: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// uapi/linux/netlink.h: text of the kernel about an error.
const NLMSGERR_ATTR_MSG: u16 = 1;

/// The kernel said no.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Refusal {
    pub(super) errno: i32,
    /// The kernel's own words (extended acknowledgement).
    pub(super) detail: Option<String>,
}

/// Which part of the kernel a socket talks to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Protocol {
    /// Interfaces, addresses, routes.
    Route,
    /// What comes in modules: WireGuard.
    Generic,
    /// IPsec.
    Xfrm,
}

/// The socket. Bound for life to the namespace it was opened in.
pub(super) struct Socket {
    fd: OwnedFd,
    seq: u32,
    buffer: Vec<u8>,
    /// Most messages in one send; 0 until the first large batch asked for room.
    batch_max: usize,
    /// Whether questions carry its number. Only IPsec looks for it there (net/xfrm/xfrm_user.c `c.portid = nlh->nlmsg_pid`), to put it
    /// into notices.
    signs: bool,
}

impl Socket {
    /// Opens a socket in this namespace, or in that of the calling thread.
    pub(super) fn open(protocol: Protocol, namespace: Option<&Namespace>) -> io::Result<Self> {
        let make = || {
            let (family, kind) = (AddressFamily::Netlink, SockType::Raw);
            match protocol {
                Protocol::Route => {
                    nix::sys::socket::socket(family, kind, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)
                        .map_err(io::Error::from)
                }
                Protocol::Generic => nix::sys::socket::socket(
                    family,
                    kind,
                    SockFlag::SOCK_CLOEXEC,
                    SockProtocol::NetlinkGeneric,
                )
                .map_err(io::Error::from),
                Protocol::Xfrm => xfrm(),
            }
        };
        // Only the socket is made inside; all else about it can be done from outside.
        let fd = namespace.map_or_else(|| Ok(make()), |namespace| namespace.run(make))??;
        set(&fd, libc::SOL_NETLINK, libc::NETLINK_EXT_ACK, 1)?;
        set(&fd, libc::SOL_NETLINK, libc::NETLINK_CAP_ACK, 1)?;
        // Without it the kernel ignores the filters of a dump (Linux 4.20 and later have it).
        set(&fd, libc::SOL_NETLINK, libc::NETLINK_GET_STRICT_CHK, 1)?;
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::seconds(ANSWER_TIMEOUT.as_secs() as i64))?;
        Ok(Self { fd, seq: 0, buffer: vec![0; READ_BYTES], batch_max: 0, signs: protocol == Protocol::Xfrm })
    }

    /// Its number, which the kernel puts into notices of what was changed through it; 0 before its first question.
    pub(super) fn port(&self) -> u32 {
        getsockname::<NetlinkAddr>(self.fd.as_raw_fd()).map_or(0, |address| address.pid())
    }

    /// Asks for everything that matches the request. `take` is shown the type and the body of each message.
    pub(super) fn dump<T>(
        &mut self,
        request: &impl NetlinkSerializable,
        mut take: impl FnMut(u16, &[u8]) -> Option<T>,
    ) -> io::Result<Result<Vec<T>, Refusal>> {
        let mut found = Vec::new();
        for _ in 0..DUMP_TRIES_MAX {
            found.clear();
            let mut batch = Batch::default();
            batch.push(request, NLM_F_DUMP);
            let seq = self.send(&mut batch)?;
            let consistent = self.read_dump(seq, |kind, body| found.extend(take(kind, body)));
            match consistent {
                Ok(Ok(true)) => return Ok(Ok(found)),
                Ok(Ok(false)) => {}
                Ok(Err(refusal)) => return Ok(Err(refusal)),
                Err(error) => {
                    self.drain();
                    return Err(error);
                }
            }
        }
        tracing::debug!(tries = DUMP_TRIES_MAX, "the kernel's tables change faster than they can be read");
        Ok(Ok(found))
    }

    /// Asks several questions that have one answer each: in order, what `take` made of the answer, or the refusal.
    pub(super) fn ask<T>(
        &mut self,
        questions: &[impl NetlinkSerializable],
        take: impl FnMut(u16, &[u8]) -> Option<T>,
    ) -> io::Result<Vec<Result<Option<T>, Refusal>>> {
        self.ask_with(questions, 0, take)
    }

    /// The same, with these flags beside NLM_F_REQUEST.
    pub(super) fn ask_with<T>(
        &mut self,
        questions: &[impl NetlinkSerializable],
        flags: u16,
        mut take: impl FnMut(u16, &[u8]) -> Option<T>,
    ) -> io::Result<Vec<Result<Option<T>, Refusal>>> {
        let mut answers = Vec::with_capacity(questions.len());
        for some in questions.chunks(QUESTIONS_MAX) {
            let mut batch = Batch::default();
            some.iter().for_each(|question| batch.push(question, flags));
            let first = self.send(&mut batch)?;
            let mut here: Vec<_> = some.iter().map(|_| None).collect();
            let mut missing = here.len();
            while missing > 0 {
                let read = self.read(|message| {
                    let Some(slot) = here.get_mut(message.seq.wrapping_sub(first) as usize) else { return };
                    if slot.is_none() {
                        missing -= 1;
                        *slot = Some(match message.refusal() {
                            Some(refusal) => Err(refusal),
                            None => Ok(take(message.kind, message.body)),
                        });
                    }
                });
                if let Err(error) = read {
                    self.drain();
                    return Err(error);
                }
            }
            answers.extend(here.into_iter().flatten());
        }
        Ok(answers)
    }

    /// Sends a batch and empties it. The answer names the messages that the kernel refused, by their place in the batch;
    /// all others were carried out.
    pub(super) fn write(&mut self, batch: &mut Batch) -> io::Result<Vec<(usize, Refusal)>> {
        let count = batch.starts.len();
        if count == 0 {
            return Ok(Vec::new());
        }
        batch.acknowledge_last();
        let first = self.send(batch)?;
        let last = first.wrapping_add(count as u32 - 1);
        let mut refusals = Vec::new();
        let mut done = false;
        while !done {
            let read = self.read(|message| {
                let place = message.seq.wrapping_sub(first) as usize;
                if place >= count || message.kind != NLMSG_ERROR {
                    return;
                }
                done |= message.seq == last;
                refusals.extend(message.refusal().map(|refusal| (place, refusal)));
            });
            if let Err(error) = read {
                self.drain();
                return Err(error);
            }
        }
        Ok(refusals)
    }

    /// Whether a batch should be sent before more is put in.
    pub(super) fn is_full(&mut self, batch: &Batch) -> bool {
        let count = batch.starts.len();
        if count < 32 {
            return false;
        }
        if self.batch_max == 0 {
            self.batch_max = self.make_room();
        }
        batch.bytes.len() >= BATCH_BYTES || count >= self.batch_max
    }

    /// Enlarges the receive buffer as far as we may; returns how many refusals fit.
    fn make_room(&self) -> usize {
        if set(&self.fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, ROOM_BYTES as i32).is_err() {
            // Not privileged in the host's user namespace: as much as net.core.rmem_max allows.
            let _ = setsockopt(&self.fd, sockopt::RcvBuf, &ROOM_BYTES);
        }
        let got = nix::sys::socket::getsockopt(&self.fd, sockopt::RcvBuf).unwrap_or(0);
        (got / REFUSAL_BYTES).max(32)
    }

    /// Numbers the messages and sends them; returns the first number.
    fn send(&mut self, batch: &mut Batch) -> io::Result<u32> {
        let first = self.seq.wrapping_add(1);
        let sender = if self.signs { self.port() } else { 0 };
        for (place, start) in batch.starts.iter().enumerate() {
            let seq = first.wrapping_add(place as u32);
            batch.bytes[start + 8..start + 12].copy_from_slice(&seq.to_ne_bytes());
            batch.bytes[start + 12..start + 16].copy_from_slice(&sender.to_ne_bytes());
            self.seq = seq;
        }
        let sent = loop {
            match send(self.fd.as_raw_fd(), &batch.bytes, MsgFlags::empty()) {
                Err(nix::errno::Errno::EINTR) => {}
                other => break other,
            }
        };
        batch.bytes.clear();
        batch.starts.clear();
        sent.map(|_| first).map_err(Into::into)
    }

    /// Reads a dump to its end; false if the kernel says that it changed meanwhile.
    fn read_dump(&mut self, seq: u32, mut take: impl FnMut(u16, &[u8])) -> io::Result<Result<bool, Refusal>> {
        let mut consistent = true;
        let mut end: Option<Result<(), Refusal>> = None;
        while end.is_none() {
            self.read(|message| {
                if message.seq != seq || end.is_some() {
                    return;
                }
                consistent &= message.flags & NLM_F_DUMP_INTR == 0;
                match message.kind {
                    NLMSG_NOOP => {}
                    NLMSG_DONE | NLMSG_ERROR => end = Some(message.refusal().map_or(Ok(()), Err)),
                    kind => take(kind, message.body),
                }
            })?;
        }
        Ok(end.unwrap_or(Ok(())).map(|()| consistent))
    }

    /// Receives once and shows every message in it.
    fn read(&mut self, mut show: impl FnMut(&Message<'_>)) -> io::Result<()> {
        let len = self.receive(MsgFlags::MSG_TRUNC)?;
        let mut rest = self.buffer.get(..len).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("a netlink message of {len} bytes does not fit"),
            )
        })?;
        while let Some((message, behind)) = Message::split(rest) {
            show(&message);
            rest = behind;
        }
        Ok(())
    }

    fn receive(&mut self, flags: MsgFlags) -> io::Result<usize> {
        loop {
            match recv(self.fd.as_raw_fd(), &mut self.buffer, flags) {
                Err(nix::errno::Errno::EINTR) => {}
                Err(nix::errno::Errno::EAGAIN) => {
                    return Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        "the kernel did not answer on netlink",
                    ));
                }
                other => return other.map_err(Into::into),
            }
        }
    }

    /// Throws away what is left of an abandoned exchange, so that the next one finds the socket clean.
    fn drain(&mut self) {
        for _ in 0..DRAIN_MAX {
            if self.receive(MsgFlags::MSG_DONTWAIT).is_err() {
                return;
            }
        }
    }
}

#[expect(unsafe_code, reason = "nix has no name for this protocol")]
fn xfrm() -> io::Result<OwnedFd> {
    // SAFETY: the call takes three numbers and no memory of ours.
    let fd =
        unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_XFRM) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[expect(unsafe_code, reason = "nix has no names for the netlink options")]
fn set(fd: &OwnedFd, level: libc::c_int, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the pointer is to an int that outlives the call, and the length is that of an int.
    let result =
        unsafe { libc::setsockopt(fd.as_raw_fd(), level, option, std::ptr::from_ref(&value).cast(), len) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Messages on their way into one send.
#[derive(Default)]
pub(super) struct Batch {
    bytes: Vec<u8>,
    starts: Vec<usize>,
}

impl Batch {
    /// Appends a request; `flags` beside NLM_F_REQUEST.
    pub(super) fn push(&mut self, message: &impl NetlinkSerializable, flags: u16) {
        let body = message.buffer_len();
        let start = self.bytes.len();
        self.starts.push(start);
        self.bytes.resize(start + HEADER + body.next_multiple_of(4), 0);
        let (header, rest) = self.bytes[start..].split_at_mut(HEADER);
        header[..4].copy_from_slice(&((HEADER + body) as u32).to_ne_bytes());
        header[4..6].copy_from_slice(&message.message_type().to_ne_bytes());
        header[6..8].copy_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
        message.serialize(&mut rest[..body]);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.starts.is_empty()
    }

    fn acknowledge_last(&mut self) {
        if let Some(start) = self.starts.last() {
            let flags = &mut self.bytes[start + 6..start + 8];
            let value = u16::from_ne_bytes([flags[0], flags[1]]) | NLM_F_ACK;
            flags.copy_from_slice(&value.to_ne_bytes());
        }
    }
}

/// One received message.
struct Message<'a> {
    kind: u16,
    flags: u16,
    seq: u32,
    body: &'a [u8],
}

impl<'a> Message<'a> {
    /// The first message of a buffer, and what is behind it.
    fn split(bytes: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let header = bytes.get(..HEADER)?;
        let len = u32_at(header, 0)? as usize;
        let body = bytes.get(HEADER..len)?;
        let message =
            Self { kind: u16_at(header, 4)?, flags: u16_at(header, 6)?, seq: u32_at(header, 8)?, body };
        Some((message, bytes.get(len.next_multiple_of(4)..).unwrap_or(&[])))
    }

    /// What the kernel refused with, if this is a refusal. An acknowledgement is an error message with code 0.
    fn refusal(&self) -> Option<Refusal> {
        if self.kind != NLMSG_ERROR && self.kind != NLMSG_DONE {
            return None;
        }
        let code = u32_at(self.body, 0)? as i32;
        if code >= 0 {
            return None;
        }
        let detail = self.texts_at().and_then(|at| {
            attributes(self.body.get(at..).unwrap_or(&[]))
                .find(|(kind, _)| *kind == NLMSGERR_ATTR_MSG)
                .map(|(_, text)| text_of(text))
        });
        Some(Refusal { errno: -code, detail })
    }

    /// Where the attributes of an error begin: behind the code and the request it answers, of which only the header is
    /// there when capped; directly behind the code at the end of a dump.
    fn texts_at(&self) -> Option<usize> {
        if self.flags & NLM_F_ACK_TLVS == 0 {
            return None;
        }
        if self.kind == NLMSG_DONE {
            return Some(4);
        }
        let request = if self.flags & NLM_F_CAPPED == 0 { u32_at(self.body, 4)? as usize } else { HEADER };
        Some(4 + request.next_multiple_of(4))
    }
}

/// The attributes of a message: kind and value. Ends at the first malformed one.
pub(super) fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    NlasIterator::new(bytes).map_while(Result::ok).map(|attribute| {
        let end = usize::from(attribute.length());
        (attribute.kind(), attribute.into_inner().get(NLA_HEADER_SIZE..end).unwrap_or(&[]))
    })
}

/// A string attribute without its final NUL.
pub(super) fn text_of(value: &[u8]) -> String {
    String::from_utf8_lossy(value).trim_end_matches('\0').to_owned()
}

/// A number in the machine's byte order.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// An address attribute, 4 or 16 bytes.
pub(super) fn ip_of(value: &[u8]) -> Option<std::net::IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(value) {
        return Some(v4.into());
    }
    <[u8; 16]>::try_from(value).ok().map(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(code: i32, flags: u16, request: &[u8], texts: &[u8]) -> Vec<u8> {
        let body = [&code.to_ne_bytes(), request, texts].concat();
        let len = (HEADER + body.len()) as u32;
        let header = [
            &len.to_ne_bytes()[..],
            &NLMSG_ERROR.to_ne_bytes(),
            &flags.to_ne_bytes(),
            &7u32.to_ne_bytes(),
            &0u32.to_ne_bytes(),
        ]
        .concat();
        [header, body].concat()
    }

    fn request(len: u32) -> Vec<u8> {
        let mut request = vec![0; len as usize];
        request[..4].copy_from_slice(&len.to_ne_bytes());
        request
    }

    const TEXT: &[u8] = b"\x0b\0\x01\0no way\0\0";

    #[test]
    fn the_kernels_words_are_found_behind_a_capped_and_a_whole_request() {
        for (flags, request) in [(NLM_F_ACK_TLVS | NLM_F_CAPPED, request(16)), (NLM_F_ACK_TLVS, request(44))]
        {
            let bytes = error(-22, flags, &request, TEXT);
            let (message, rest) = Message::split(&bytes).unwrap();
            assert!(rest.is_empty());
            assert_eq!(message.refusal(), Some(Refusal { errno: 22, detail: Some("no way".into()) }));
        }
    }

    #[test]
    fn an_acknowledgement_is_no_refusal_and_a_refusal_may_be_silent() {
        let bytes = error(0, NLM_F_CAPPED, &request(16), &[]);
        assert_eq!(Message::split(&bytes).unwrap().0.refusal(), None);
        let bytes = error(-17, NLM_F_CAPPED, &request(16), &[]);
        assert_eq!(Message::split(&bytes).unwrap().0.refusal(), Some(Refusal { errno: 17, detail: None }));
    }

    #[test]
    fn broken_bytes_end_the_reading() {
        let whole = error(-22, NLM_F_ACK_TLVS | NLM_F_CAPPED, &request(16), TEXT);
        for cut in 0..whole.len() {
            if let Some((message, _)) = Message::split(&whole[..cut]) {
                let _ = message.refusal();
            }
        }
        let mut short = whole;
        short[0] = 3;
        assert!(Message::split(&short).is_none());
    }
}
