//! A way to etcd that can be shut: what is on it stays unanswered, as when a cable is cut.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use flannel_core::run::store::EtcdSettings;

use crate::fixture::Etcd;

/// Ends with the test's process.
pub(crate) struct Gate {
    here: SocketAddr,
    shut: Arc<AtomicBool>,
    open: Arc<Mutex<Vec<TcpStream>>>,
}

impl Gate {
    pub(crate) fn to(etcd: &Etcd) -> Self {
        let there = etcd.url().trim_start_matches("http://").to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let here = listener.local_addr().unwrap();
        let shut = Arc::new(AtomicBool::new(false));
        let open = Arc::new(Mutex::new(Vec::new()));
        let gate = Self { here, shut: shut.clone(), open: open.clone() };
        thread::spawn(move || {
            for inward in listener.incoming().flatten() {
                // While it is shut a connection comes up, as with a firewall that only drops, and nothing is said on it.
                let Ok(outward) = TcpStream::connect(&there) else { continue };
                for (from, to) in [(&inward, &outward), (&outward, &inward)] {
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    let shut = shut.clone();
                    thread::spawn(move || carry(from, to, &shut));
                }
                open.lock().unwrap().extend([inward, outward]);
            }
        });
        gate
    }

    pub(crate) fn settings(&self) -> EtcdSettings {
        EtcdSettings { endpoints: vec![format!("http://{}", self.here)], ..EtcdSettings::default() }
    }

    pub(crate) fn shut(&self) {
        self.shut.store(true, Ordering::SeqCst);
    }

    /// What was on the way is lost: connections of before are closed.
    pub(crate) fn reopen(&self) {
        for stream in self.open.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
        self.shut.store(false, Ordering::SeqCst);
    }
}

fn carry(mut from: TcpStream, mut to: TcpStream, shut: &AtomicBool) {
    let mut buffer = [0; 16 << 10];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        while shut.load(Ordering::SeqCst) {
            if from.peer_addr().is_err() {
                return;
            }
            thread::sleep(Duration::from_millis(5));
        }
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
}
