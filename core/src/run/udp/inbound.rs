//! From the peers to the device.

use std::io;
use std::net::Ipv4Addr;
use std::ops::Range;
use std::time::Instant;

use super::gather::Gather;
use super::icmp::{self, Limiter, Trouble};
use super::mmsg::{Headers, Received, SLOT};
use super::packet::{Header, age};
use super::route_table::RouteTable;
use super::shared::{Complaint, Lane, Turn};

/// One queue's way in.
pub(super) struct Inbound {
    lane: Lane,
    buffer: Vec<u8>,
    headers: Headers,
    received: Vec<Received>,
    gather: Gather,
    limiter: Limiter,
    strangers: Complaint,
    spoofed: Complaint,
    refused: Complaint,
}

impl Inbound {
    pub(super) fn new(lane: Lane) -> Self {
        Self {
            buffer: vec![0; lane.mode.slots * SLOT],
            headers: Headers::new(),
            received: Vec::new(),
            gather: Gather::new(lane.mode.offload),
            limiter: Limiter::new(Instant::now()),
            strangers: Complaint::new("udp: datagrams dropped that came from nobody who holds a lease"),
            spoofed: Complaint::new("udp: packets dropped that are not from their sender's subnet to ours"),
            refused: Complaint::new("udp: packets that the device did not take"),
            lane,
        }
    }

    /// Carries what is there, as far as there is room for it.
    pub(super) fn turn(&mut self) -> Turn {
        match self.headers.receive(&self.lane.socket, &mut self.buffer, &mut self.received) {
            Ok(()) => {
                // As many as there is room for: there may be more.
                let is_full = self.received.len() >= self.lane.mode.slots;
                self.take();
                if is_full { Turn::Again } else { Turn::Wait }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Turn::Wait,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Turn::Again,
            // Errors that the network reported for what was sent earlier.
            Err(_) => Turn::Failed,
        }
    }

    fn take(&mut self) {
        let table = self.lane.shared.table();
        let all = std::mem::take(&mut self.received);
        for received in &all {
            let mut start = received.bytes.start;
            while start < received.bytes.end {
                let end = (start + received.segment).min(received.bytes.end);
                self.admit(&table, received.from, start..end);
                start = end;
            }
        }
        // Its room is used again.
        self.received = all;
        if let Err(error) = self.gather.flush(&self.buffer, &self.lane.queue) {
            self.refused.more(|| format!("the last one: {error}"));
        }
    }

    /// Takes a packet if its sender may send it: the holder of the source's subnet, to somebody in ours.
    fn admit(&mut self, table: &RouteTable, from: Ipv4Addr, place: Range<usize>) {
        let packet = &mut self.buffer[place.clone()];
        let header = Header::read(packet);
        let Some(header) = header.filter(|header| table.find(header.source) == Some(from)) else {
            return self.stranger(table, from, header);
        };
        if !table.is_own(header.destination) {
            return self.stranger(table, from, Some(header));
        }
        if header.ttl <= 1 {
            return self.expired(table, from, place);
        }
        age(packet);
        self.gather.push(&self.buffer, place, Header { ttl: header.ttl - 1, ..header });
    }

    fn stranger(&mut self, table: &RouteTable, from: Ipv4Addr, header: Option<Header>) {
        match header {
            _ if !table.is_holder(from) => self.strangers.more(|| format!("the last one: {from}")),
            Some(Header { source, destination, .. }) => {
                self.spoofed.more(|| format!("the last one: {source} to {destination}, by {from}"));
            }
            None => self.spoofed.more(|| format!("the last one was no IPv4 packet, by {from}")),
        }
    }

    fn expired(&mut self, table: &RouteTable, from: Ipv4Addr, place: Range<usize>) {
        let packet = &self.buffer[place];
        if let Some(address) = table.address
            && let Some(error) = icmp::error(Trouble::TimeExceeded, address, packet)
            && self.limiter.allows(Instant::now())
        {
            // The way back, as any packet goes; nobody is left to be told if it fails.
            let _ = self.lane.socket.send_to(&error, (from, self.lane.port));
        }
    }
}
