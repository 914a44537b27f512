//! The flannel CNI plugin: a container's place on a flannel network, in one process.
//!
//! One exec for each command, no daemon asked, no other plugin needed. stdout is the answer, stderr is talk.

/// Says a line on stderr. Unlike `eprintln!` it does not mind that nobody listens any more.
macro_rules! say {
    ($($text:tt)*) => {{
        let _ = ::std::io::Write::write_all(&mut ::std::io::stderr(), format!("{}\n", format_args!($($text)*)).as_bytes());
    }};
}

mod args;
mod bandwidth;
mod bridge;
mod conf;
mod delegate;
mod errors;
mod extras;
mod firewall;
mod flannel;
mod go_leftovers;
mod host_local;
mod install;
mod json;
mod loopback;
mod plugin;
mod portmap;
mod ports;
mod previous;
mod result;
mod sandbox;
mod state;
mod tuning;
mod upkeep;

use std::env;
use std::fs;
use std::io::{self, Read, Write};
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use args::{Asked, Call, Verb};
use conf::Conf;
use plugin::Plugin;
use result::{Answer, CniError, Version};

#[global_allocator]
static ALLOCATOR: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

fn main() -> ExitCode {
    // No runtime gives arguments; a person does, and sets no variables.
    if env::var_os("CNI_COMMAND").is_none_or(|verb| verb.is_empty()) && env::args_os().len() > 1 {
        return install::command_line(env::args_os().skip(1));
    }
    let plugin = Plugin::called_by(env::args_os().next());
    let (version, outcome) = match Call::from_env() {
        Ok(Asked::Nothing) => return about(plugin),
        Ok(Asked::Versions) => {
            (Version::NEWEST, Ok(Answer::Value(result::versions(asked_version().as_deref()))))
        }
        Ok(Asked::Call(call)) => serve(plugin, &call),
        Err(error) => (Version::NEWEST, Err(error)),
    };
    match outcome {
        Ok(answer) => print(&answer, ExitCode::SUCCESS),
        Err(error) => print(&Answer::Value(error.render(version)), ExitCode::FAILURE),
    }
}

/// The release of upstream's plugins that ours of the same names do the work of.
const UPSTREAM: &str = "1.9.1";

/// Somebody wants to know what this is. Tools read the first line: nerdctl isolates networks when `firewall` is 1.1.0 or newer.
fn about(plugin: Plugin) -> ExitCode {
    let versions = Version::ALL.map(Version::text).join(", ");
    let own = env!("CARGO_PKG_VERSION");
    let version =
        if plugin == Plugin::Flannel { own.to_owned() } else { format!("{UPSTREAM}+flannel.{own}") };
    say!("CNI {} plugin v{version}", plugin.name());
    say!("CNI protocol versions supported: {versions}");
    ExitCode::SUCCESS
}

/// The answer, and the version to put an error in.
fn serve(plugin: Plugin, call: &Call) -> (Version, Result<Answer, CniError>) {
    let stdin = match read_stdin() {
        Ok(stdin) => stdin,
        Err(error) => return (Version::NEWEST, Err(error)),
    };
    match Conf::parse(&stdin) {
        Ok(conf) => (conf.version, run(plugin, call, &conf)),
        Err(error) => (Version::named_in(&stdin), Err(error)),
    }
}

/// Has the plugin do what the call asks for.
fn run(plugin: Plugin, call: &Call, conf: &Conf) -> Result<Answer, CniError> {
    let since = match call.verb {
        Verb::Add | Verb::Del => Version::V0_1_0,
        Verb::Check => Version::V0_4_0,
        Verb::Gc | Verb::Status => Version::V1_1_0,
    };
    if conf.version < since {
        let msg = format!("config version does not allow {}", call.verb.name());
        return Err(CniError::new(CniError::INCOMPATIBLE, msg));
    }
    match plugin {
        Plugin::Flannel => flannel::run(call, conf),
        Plugin::Bridge => bridge::run(call, conf),
        Plugin::HostLocal => host_local::run(call, conf),
        Plugin::Bandwidth => bandwidth::run(call, conf),
        Plugin::Loopback => loopback::run(call, conf),
        Plugin::Portmap => portmap::run(call, conf),
        Plugin::Tuning => tuning::run(call, conf),
        Plugin::Firewall => firewall::run(call, conf),
    }
}

/// The version in which versions are asked for. Tools ask all the time, and some say nothing and leave stdin open: they
/// need not be waited for.
fn asked_version() -> Option<String> {
    const PATIENCE: Duration = Duration::from_millis(50);
    if fs::metadata("/proc/self/fd/0").is_ok_and(|stdin| stdin.is_file()) {
        return read_version();
    }
    let (tell, told) = mpsc::channel();
    thread::spawn(move || tell.send(read_version()));
    told.recv_timeout(PATIENCE).ok().flatten()
}

/// From stdin, as soon as what came is complete.
fn read_version() -> Option<String> {
    const LENGTH_MAX: usize = 1 << 20;
    let (mut text, mut chunk) = (Vec::new(), [0; 4096]);
    while text.len() < LENGTH_MAX {
        match io::stdin().read(&mut chunk) {
            Ok(length @ 1..) => text.extend_from_slice(&chunk[..length]),
            _ => break,
        }
        if let Ok(asked) = serde_json::from_slice::<json::Object>(&text) {
            return json::text(&asked, "cniVersion").ok().flatten();
        }
    }
    None
}

fn read_stdin() -> Result<Vec<u8>, CniError> {
    // Room for any configuration in one read.
    let mut stdin = Vec::with_capacity(16 * 1024);
    io::stdin().lock().read_to_end(&mut stdin).map_err(|error| {
        CniError::new(CniError::INPUT, "error reading from stdin").with_details(error.to_string())
    })?;
    Ok(stdin)
}

fn print(answer: &Answer, code: ExitCode) -> ExitCode {
    let bytes = match answer {
        Answer::Nothing => return code,
        Answer::Value(value) => value.to_string().into_bytes(),
        Answer::Printed(bytes) => bytes.clone(),
    };
    let mut stdout = io::stdout().lock();
    match stdout.write_all(&bytes).and_then(|()| stdout.flush()) {
        Ok(()) => code,
        Err(error) => {
            say!("flannel: could not print the answer: {error}");
            ExitCode::FAILURE
        }
    }
}
