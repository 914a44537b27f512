//! What the thread of a lane does: it takes turns at both ways, and sleeps while neither has anything to do.
//!
//! One thread, since the ways feed each other: what is written to the device is often answered before the call returns
//! (acknowledgements, and what they let follow), and then lies there to be read. With a thread for each way every one of those
//! answers wakes somebody: half as much processor time again for each byte of a TCP stream (`bench udp`).

use std::os::fd::AsFd;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::inbound::Inbound;
use super::outbound::Outbound;
use super::shared::{Lane, Shared, Turn};

/// How long a thread rests after an error, so that one that stays costs little. In milliseconds.
const REST_MS: u16 = 20;

/// Runs until the tunnel is over.
pub(super) fn run(lane: &Lane) {
    let (mut into, mut out) = (Inbound::new(lane.clone()), Outbound::new(lane.clone()));
    while !lane.shared.is_over() {
        match (into.turn(), out.turn()) {
            (Turn::Again, _) | (_, Turn::Again) => {}
            (Turn::Failed, _) | (_, Turn::Failed) => rest(&lane.shared),
            (Turn::Wait, Turn::Wait) => wait(lane),
        }
    }
}

/// Until there is something to read.
fn wait(lane: &Lane) {
    let sources = [lane.socket.as_fd(), lane.queue.as_fd(), lane.shared.over()];
    // Errors and interruptions are seen by whoever reads next.
    let _ = poll(&mut sources.map(|source| PollFd::new(source, PollFlags::POLLIN)), PollTimeout::NONE);
}

fn rest(shared: &Shared) {
    let mut over = [PollFd::new(shared.over(), PollFlags::POLLIN)];
    let _ = poll(&mut over, PollTimeout::from(REST_MS));
}
