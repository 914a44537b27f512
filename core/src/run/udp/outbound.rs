//! From the device to the peers.

use std::io;
use std::net::Ipv4Addr;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::batch::Batch;
use super::icmp::{self, Limiter, Trouble};
use super::mmsg::{Headers, Message};
use super::offload::{Large, Request, VNET_HEADER, complete, template};
use super::packet::{Header, age, fragments};
use super::route_table::RouteTable;
use super::shared::{Complaint, Lane, Turn};
use super::socket;
use crate::words::units::Overhead;

/// One queue's way out.
pub(super) struct Outbound {
    lane: Lane,
    batch: Batch,
    headers: Headers,
    table: Arc<RouteTable>,
    limiter: Limiter,
    complaint: Complaint,
}

impl Outbound {
    pub(super) fn new(lane: Lane) -> Self {
        Self {
            batch: Batch::new(),
            headers: Headers::new(),
            table: lane.shared.table(),
            limiter: Limiter::new(Instant::now()),
            complaint: Complaint::new("udp: packets could not be sent"),
            lane,
        }
    }

    /// Carries what is there, as far as there is room for it.
    pub(super) fn turn(&mut self) -> Turn {
        // The device is gone (EBADFD), or down (EIO): the next pass finds out and mends it.
        self.read().unwrap_or(Turn::Failed)
    }

    /// Reads what is there, as far as there is room, and sends it.
    fn read(&mut self) -> io::Result<Turn> {
        self.batch.clear();
        self.table = self.lane.shared.table();
        let mut turn = Turn::Again;
        for _ in 0..self.lane.mode.reads {
            let Some(room) = self.batch.room() else { break };
            match self.lane.queue.read(&mut self.batch.buffer[room.clone()]) {
                Ok(read) => {
                    self.batch.filled(read);
                    self.carry(room.start..room.start + read);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    turn = Turn::Wait;
                    break;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.send();
                    return Err(error);
                }
            }
        }
        self.send();
        Ok(turn)
    }

    /// Takes one packet as it was read.
    fn carry(&mut self, mut place: Range<usize>) {
        let mut request = Request::Nothing;
        if self.lane.queue.headers {
            let Some(header) = self.batch.buffer[place.clone()].first_chunk::<VNET_HEADER>() else { return };
            // What we never asked for never comes.
            let Some(read) = Request::read(header) else { return };
            request = read;
            place.start += VNET_HEADER;
        }
        let packet = &mut self.batch.buffer[place.clone()];
        // Other families are not carried: router solicitations, for example.
        let Some(header) = Header::read(packet) else { return };
        let Some(to) = self.table.find(header.destination) else {
            return self.answer(Trouble::NetUnreachable, &place);
        };
        if header.ttl <= 1 {
            return self.answer(Trouble::TimeExceeded, &place);
        }
        age(packet);
        place.end = place.start + header.total;
        match request {
            Request::Nothing => {}
            Request::Checksum { start, at } => {
                if !complete(&mut packet[..header.total], start, at) {
                    return;
                }
            }
            Request::Segments { transport, size } => {
                let header = Header { ttl: header.ttl - 1, ..header };
                if let Some(large) = Large::new(packet, header, transport, size) {
                    self.cut(to, &place, &large);
                }
                return;
            }
        }
        self.make_room(0);
        self.batch.push(to, &[place], self.together());
    }

    fn cut(&mut self, to: Ipv4Addr, place: &Range<usize>, large: &Large) {
        let whole = template(&self.batch.buffer[place.clone()]);
        for index in 0..large.count() {
            self.make_room(large.heads);
            let payload = large.payload(index);
            let payload = place.start + payload.start..place.start + payload.end;
            let head = self.batch.reserve_head(large.heads);
            let (heads, first, packets) = self.batch.split();
            let bytes = &packets[payload.start - first..payload.end - first];
            large.head(&whole, index, bytes, &mut heads[head.clone()]);
            self.batch.push(to, &[head, payload], self.together());
        }
    }

    fn together(&self) -> bool {
        self.lane.mode.gso && self.lane.shared.cuts()
    }

    fn make_room(&mut self, head: usize) {
        if !self.batch.takes(head) {
            self.send();
        }
    }

    /// Tells the sender of a packet, at most so often.
    fn answer(&mut self, trouble: Trouble, place: &Range<usize>) {
        let packet = &self.batch.buffer[place.clone()];
        if let Some(address) = self.table.address
            && let Some(error) = icmp::error(trouble, address, packet)
            && self.limiter.allows(Instant::now())
        {
            // Nobody is left to be told if this fails.
            let _ = self.lane.queue.write(&error);
        }
    }

    /// Sends what is in the batch.
    fn send(&mut self) {
        let mut first = 0;
        while first < self.batch.messages.len() {
            let Batch { buffer, parts, messages, .. } = &self.batch;
            let (sent, error) =
                self.headers.send(&self.lane.socket, self.lane.port, buffer, parts, &messages[first..]);
            first += sent;
            let Some(error) = error else { break };
            if let Some(message) = self.batch.messages.get(first).cloned() {
                self.refused(&message, &error);
            }
            first += 1;
        }
        self.batch.sent();
    }

    /// The kernel did not take a message. One of several datagrams is sent once more as what it is: a device without
    /// checksums cannot cut (EIO), and a path with a smaller MTU takes none of them (EINVAL, EMSGSIZE).
    fn refused(&mut self, message: &Message, error: &io::Error) {
        if message.count > 1 {
            if error.raw_os_error() == Some(libc::EIO) {
                self.lane.shared.cut_no_more();
            }
            for index in 0..message.count {
                let datagram = self.batch.datagram(message, index);
                self.send_one(message.to, &datagram);
            }
        } else {
            let datagram = self.batch.datagram(message, 0);
            self.failed(message.to, &datagram, error);
        }
    }

    fn send_one(&mut self, to: Ipv4Addr, datagram: &[u8]) {
        if let Err(error) = self.lane.socket.send_to(datagram, (to, self.lane.port)) {
            self.failed(to, datagram, &error);
        }
    }

    fn failed(&mut self, to: Ipv4Addr, datagram: &[u8], error: &io::Error) {
        match error.raw_os_error() {
            Some(libc::EMSGSIZE) => self.too_big(to, datagram),
            _ => self.complaint.more(|| format!("the last one to {to}: {error}")),
        }
    }

    /// The path is narrower than our uplink: the sender learns it, or the packet is cut.
    fn too_big(&mut self, to: Ipv4Addr, datagram: &[u8]) {
        let Some(header) = Header::read(datagram) else { return };
        let Ok(path) = socket::path_mtu(to, self.lane.port) else { return };
        let mtu = path.saturating_sub(Overhead::UDP_OVER_V4.0 as usize);
        if mtu >= header.total {
            // It has become wider meanwhile.
            return;
        }
        if header.dont_fragment {
            if let Some(address) = self.table.address
                && let Some(error) = icmp::error(Trouble::TooBig(mtu as u16), address, datagram)
                && self.limiter.allows(Instant::now())
            {
                let _ = self.lane.queue.write(&error);
            }
            return;
        }
        for fragment in fragments(datagram, mtu) {
            if let Err(error) = self.lane.socket.send_to(&fragment, (to, self.lane.port)) {
                self.complaint.more(|| format!("the last one to {to}: {error}"));
            }
        }
    }
}
