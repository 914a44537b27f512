//! Questions about the network, and the one way to wait: on a state, with a deadline.

use std::fmt::Display;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Between two looks.
const NAP: Duration = Duration::from_millis(10);

/// So many seconds.
pub fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// What a condition may be: a `bool`, an `Option`, or a `Result`, whose error then says what was seen last.
pub trait Condition {
    /// What comes out when it holds.
    type Value;
    /// The value, or what was seen instead.
    fn seen(self) -> std::result::Result<Self::Value, String>;
}

impl Condition for bool {
    type Value = ();
    fn seen(self) -> std::result::Result<(), String> {
        if self { Ok(()) } else { Err("false".to_owned()) }
    }
}

impl<T> Condition for Option<T> {
    type Value = T;
    fn seen(self) -> std::result::Result<T, String> {
        self.ok_or_else(|| "nothing".to_owned())
    }
}

impl<T> Condition for Result<T> {
    type Value = T;
    fn seen(self) -> std::result::Result<T, String> {
        self.map_err(|error| format!("{error:#}"))
    }
}

/// Looks until `condition` holds, and returns its value; at the deadline an error that says `what` was waited for and what was
/// seen last. A state is asked for, never an event: it does not matter when it came true.
pub fn eventually<C: Condition>(
    what: impl Display,
    deadline: Duration,
    mut condition: impl FnMut() -> C,
) -> Result<C::Value> {
    let start = Instant::now();
    loop {
        let last_look = start.elapsed() >= deadline;
        match condition().seen() {
            Ok(value) => return Ok(value),
            Err(seen) if last_look => bail!("waited {deadline:?} for: {what}\nlast seen: {seen}"),
            Err(_) => thread::sleep(NAP),
        }
    }
}
