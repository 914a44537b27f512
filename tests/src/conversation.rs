//! What an engine and a plugin say to each other: a proxy between them that writes everything down and can cut in.
//!
//! The engine finds the proxy where it looks for the plugin ([`PLUGIN_SOCKET`]); the plugin listens elsewhere
//! ([`HIDDEN_SOCKET`], outside the directory that engines search). A [`Trap`] springs at a chosen place of a chosen call:
//! what it does (kill one of the two, or both) is the test's business, and the connection is then cut, as it would be.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::host::Host;

/// Where engines look for a plugin called flannel.
pub const PLUGIN_SOCKET: &str = "/run/docker/plugins/flannel.sock";

/// Where the plugin listens when a proxy stands in front of it.
pub const HIDDEN_SOCKET: &str = "/run/lab/plugin.sock";

/// Between two looks at whether the proxy is to end.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// How long a call waits for a plugin that is being started again; the engine would try again and again for 15 s.
const PLUGIN_DEADLINE: Duration = Duration::from_secs(12);

/// How long a plugin may take to answer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(60);

/// One call: what the engine sent and what it heard.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Call {
    /// `NetworkDriver.Join`
    pub method: String,
    /// The request's body; null if it was empty.
    pub request: Value,
    /// HTTP status; 0 if the engine got no answer.
    pub status: u16,
    /// The answer's body; null if there was none.
    pub answer: Value,
    /// When the request was there, milliseconds since the proxy's start.
    #[serde(default, skip_serializing)]
    pub at: f64,
    /// From then to the answer's last byte, milliseconds.
    #[serde(default, skip_serializing)]
    pub ms: f64,
}

/// How long a plugin kept its engine waiting, milliseconds: time in which at least one call was under way.
pub fn time_under_way(calls: &[Call]) -> f64 {
    let mut spans: Vec<(f64, f64)> = calls.iter().map(|call| (call.at, call.at + call.ms)).collect();
    spans.sort_by(|one, other| one.0.total_cmp(&other.0));
    let (mut total, mut until) = (0.0, f64::MIN);
    for (start, end) in spans {
        total += (end - start.max(until)).max(0.0);
        until = until.max(end);
    }
    total
}

/// Where in a call a trap springs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// The engine has sent its request; the plugin has seen nothing of it.
    BeforeRequest,
    /// The plugin has seen so many bytes of it.
    InRequest(usize),
    /// The plugin has answered; the engine has heard nothing.
    BeforeAnswer,
    /// The engine has heard so many bytes of the answer.
    InAnswer(usize),
    /// The engine has heard the answer.
    AfterAnswer,
}

/// Springs once.
pub struct Trap {
    /// At which call from now on; the next one is 1.
    pub call: usize,
    /// Where in it.
    pub when: When,
    /// What it does.
    pub strike: Box<dyn FnOnce() + Send>,
}

/// A running proxy; dropping it ends it.
pub struct Proxy {
    shared: Arc<Shared>,
    listener: Option<JoinHandle<()>>,
    socket: PathBuf,
}

struct Shared {
    plugin: PathBuf,
    start: Instant,
    calls: Mutex<Vec<Call>>,
    trap: Mutex<Option<Trap>>,
    /// A trap that has sprung; says where.
    sprung: Mutex<Option<String>>,
    ends: AtomicBool,
}

impl Proxy {
    /// Listens at [`PLUGIN_SOCKET`] of a host, and calls [`HIDDEN_SOCKET`] there.
    pub fn start(host: &Host) -> Result<Self> {
        let socket = host.path(PLUGIN_SOCKET);
        if let Some(dir) = socket.parent() {
            fs::create_dir_all(dir)?;
        }
        let _ = fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket)
            .with_context(|| format!("could not listen on {}", socket.display()))?;
        let shared = Arc::new(Shared {
            plugin: host.path(HIDDEN_SOCKET),
            start: Instant::now(),
            calls: Mutex::default(),
            trap: Mutex::default(),
            sprung: Mutex::default(),
            ends: AtomicBool::new(false),
        });
        let serving = Arc::clone(&shared);
        let listener = thread::spawn(move || serving.listen(&listener));
        Ok(Self { shared, listener: Some(listener), socket })
    }

    /// Everything said so far.
    pub fn calls(&self) -> Vec<Call> {
        lock(&self.shared.calls).clone()
    }

    /// How many calls there were so far.
    pub fn count(&self) -> usize {
        lock(&self.shared.calls).len()
    }

    /// Forgets what was said, and returns it.
    pub fn take(&self) -> Vec<Call> {
        std::mem::take(&mut *lock(&self.shared.calls))
    }

    /// Sets a trap, in place of the one that may be there.
    pub fn set(&self, trap: Trap) {
        *lock(&self.shared.sprung) = None;
        *lock(&self.shared.trap) = Some(trap);
    }

    /// Takes the trap away; the answer says where it has sprung, if it has.
    pub fn disarm(&self) -> Option<String> {
        let _ = lock(&self.shared.trap).take();
        lock(&self.shared.sprung).take()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::Relaxed);
        // Wakes the listener; the threads of connections look for themselves.
        let _ = UnixStream::connect(&self.socket);
        if let Some(listener) = self.listener.take() {
            let _ = listener.join();
        }
        let _ = fs::remove_file(&self.socket);
    }
}

fn lock<T>(value: &Mutex<T>) -> MutexGuard<'_, T> {
    value.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn ends(&self) -> bool {
        self.ends.load(Ordering::Relaxed)
    }

    fn listen(self: &Arc<Self>, listener: &UnixListener) {
        for connection in listener.incoming() {
            if self.ends() {
                return;
            }
            let Ok(connection) = connection else { continue };
            let shared = Arc::clone(self);
            thread::spawn(move || {
                // A connection that breaks is the other side's doing, or a trap's.
                let _ = shared.serve(connection);
            });
        }
    }

    /// Serves one connection of an engine until either side has enough.
    fn serve(&self, mut engine: UnixStream) -> io::Result<()> {
        engine.set_read_timeout(Some(LOOK_EVERY))?;
        let mut left = Vec::new();
        while let Some(request) = Message::read(&mut engine, &mut left, || !self.ends())? {
            let trap = self.trap_of_this_call();
            let goes_on = self.pass(&mut engine, &request, trap)?;
            if !goes_on {
                return Ok(());
            }
        }
        Ok(())
    }

    fn trap_of_this_call(&self) -> Option<Trap> {
        let mut armed = lock(&self.trap);
        if let Some(trap) = armed.as_mut() {
            trap.call = trap.call.saturating_sub(1);
        }
        armed.take_if(|trap| trap.call == 0)
    }

    /// Passes one call on. False: the connection is to be cut.
    fn pass(&self, engine: &mut UnixStream, request: &Message, mut trap: Option<Trap>) -> io::Result<bool> {
        let start = Instant::now();
        let mut call = Call {
            method: request.method(),
            request: request.json(),
            status: 0,
            answer: Value::Null,
            at: start.duration_since(self.start).as_secs_f64() * 1000.0,
            ms: 0.0,
        };
        let when = trap.as_ref().map(|trap| trap.when);
        let answer = match when {
            Some(When::BeforeRequest) => None,
            Some(When::InRequest(bytes)) => {
                let mut plugin = self.connect()?;
                let forwarded = request.forwarded();
                plugin.write_all(&forwarded[..bytes.min(forwarded.len())])?;
                self.spring(&mut trap, &call);
                None
            }
            _ => self.ask(request),
        };
        let Some(answer) = answer else {
            lock(&self.calls).push(call.clone());
            self.spring(&mut trap, &call);
            return Ok(false);
        };
        (call.status, call.answer) = (answer.status(), answer.json());
        call.ms = start.elapsed().as_secs_f64() * 1000.0;
        let bytes = answer.forwarded();
        let heard = match when {
            Some(When::BeforeAnswer) => 0,
            Some(When::InAnswer(heard)) => heard.min(bytes.len()),
            _ => bytes.len(),
        };
        lock(&self.calls).push(call.clone());
        let written = engine.write_all(&bytes[..heard]);
        self.spring(&mut trap, &call);
        written.map(|()| heard == bytes.len())
    }

    fn spring(&self, trap: &mut Option<Trap>, call: &Call) {
        if let Some(trap) = trap.take() {
            (trap.strike)();
            *lock(&self.sprung) = Some(format!("{:?} of {}", trap.when, call.method));
        }
    }

    /// The plugin's answer; none if it died over it.
    fn ask(&self, request: &Message) -> Option<Message> {
        let mut plugin = self.connect().ok()?;
        plugin.write_all(&request.forwarded()).ok()?;
        let deadline = Instant::now() + ANSWER_DEADLINE;
        Message::read(&mut plugin, &mut Vec::new(), || Instant::now() < deadline && !self.ends()).ok()?
    }

    fn connect(&self) -> io::Result<UnixStream> {
        let start = Instant::now();
        loop {
            match UnixStream::connect(&self.plugin) {
                Ok(plugin) => {
                    plugin.set_read_timeout(Some(LOOK_EVERY))?;
                    return Ok(plugin);
                }
                Err(error) if start.elapsed() > PLUGIN_DEADLINE || self.ends() => return Err(error),
                Err(_) => thread::sleep(Duration::from_millis(10)),
            }
        }
    }
}

/// A request or an answer.
struct Message {
    head: String,
    body: Vec<u8>,
}

impl Message {
    /// Reads one; none at the end of the stream. `left` holds what came after the message before.
    fn read(
        from: &mut UnixStream,
        left: &mut Vec<u8>,
        patient: impl Fn() -> bool,
    ) -> io::Result<Option<Self>> {
        const END: &[u8] = b"\r\n\r\n";
        let mut chunk = [0_u8; 16 * 1024];
        loop {
            let head = left.windows(END.len()).position(|found| found == END).map(|at| at + END.len());
            if let Some(body) = head {
                let head = String::from_utf8_lossy(&left[..body]).into_owned();
                let end = body + content_length(&head);
                if left.len() >= end {
                    let rest = left.split_off(end);
                    let body = left.split_off(body);
                    *left = rest;
                    return Ok(Some(Self { head, body }));
                }
            }
            match from.read(&mut chunk) {
                Ok(0) => return Ok(None),
                Ok(n) => left.extend_from_slice(&chunk[..n]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && patient() => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn method(&self) -> String {
        let path = self.head.split(' ').nth(1).unwrap_or_default();
        path.trim_start_matches('/').to_owned()
    }

    fn status(&self) -> u16 {
        self.head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0)
    }

    fn json(&self) -> Value {
        match serde_json::from_slice(&self.body) {
            Ok(value) => value,
            Err(_) if self.body.is_empty() => Value::Null,
            Err(_) => Value::String(String::from_utf8_lossy(&self.body).into_owned()),
        }
    }

    /// As it is passed on.
    fn forwarded(&self) -> Vec<u8> {
        [self.head.as_bytes(), &self.body].concat()
    }
}

fn content_length(head: &str) -> usize {
    let value = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().ok())?
    });
    value.unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_told_apart_on_one_connection() {
        let (mut one, mut other) = UnixStream::pair().unwrap();
        one.write_all(b"POST /A.B HTTP/1.1\r\ncontent-length: 2\r\n\r\n{}POST /C.D HTTP/1.1\r\n\r\n")
            .unwrap();
        drop(one);
        let mut left = Vec::new();
        let first = Message::read(&mut other, &mut left, || true).unwrap().unwrap();
        assert_eq!((first.method().as_str(), first.json()), ("A.B", serde_json::json!({})));
        let second = Message::read(&mut other, &mut left, || true).unwrap().unwrap();
        assert_eq!((second.method().as_str(), second.json()), ("C.D", Value::Null));
        assert!(Message::read(&mut other, &mut left, || true).unwrap().is_none());
    }

    #[test]
    fn calls_that_overlap_are_waited_for_once() {
        let call = |at: f64, ms: f64| Call {
            method: String::new(),
            request: Value::Null,
            status: 200,
            answer: Value::Null,
            at,
            ms,
        };
        let calls = [call(20.0, 1.0), call(0.0, 10.0), call(5.0, 3.0), call(8.0, 4.0)];
        assert!((time_under_way(&calls) - 13.0).abs() < 1e-9);
        assert!(time_under_way(&[]).abs() < 1e-9);
    }
}
