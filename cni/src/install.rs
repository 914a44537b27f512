//! The command line of a person: `--install` puts the binary, its other names and a configuration in place; `--version`, `--help`.
//!
//! Everything is written under another name in the same directory and renamed: a running plugin cannot be overwritten, half a
//! file is never seen, and containerd, which looks at renames but not at new files, notices the configuration.

#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{self, ExitCode};

use serde_json::Value;
use thiserror::Error;

use crate::plugin::Plugin;

/// The plugin that networks name.
const BINARY: &str = "flannel";

/// The same again; the other names lead here. kube-flannel's pods copy Go's plugin over `flannel` whenever they start: a `bridge`
/// that leads there would be Go's flannel then, which executes `bridge`, for ever.
const LINKED: &str = "flannel-plugins";

const CONFLIST: &str = "10-flannel.conflist";
const CONFLIST_TEXT: &str = include_str!("../../deploy/cni/10-flannel.conflist");

const HELP: &str = "\
flannel: a CNI plugin. Runtimes call it with CNI_COMMAND in its environment and a configuration on stdin.

  flannel --install [--bin-dir DIR] [--conf-dir DIR] [--link NAME]... [--no-links] [--no-conf] [--force]
  flannel --version
  flannel --help

--install copies this binary, links the names of the other plugins that it is to a second copy (flannel-plugins), and writes
10-flannel.conflist. It may be run on a live node, and again.
  --bin-dir DIR   where runtimes look for plugins; /opt/cni/bin
  --conf-dir DIR  where runtimes look for networks; /etc/cni/net.d
  --link NAME     link this name only; may be given again
  --no-links      link no name
  --no-conf       write no configuration
  --force         replace other programs of these names, and a 10-flannel.conflist that differs
";

/// What could not be done.
#[derive(Debug, Error)]
enum Trouble {
    /// The command line makes no sense.
    #[error("{0}; `flannel --help` lists what there is")]
    Usage(String),
    /// A file or directory could not be read or written.
    #[error("could not {action} {}: {error}", path.display())]
    File { action: &'static str, path: PathBuf, error: io::Error },
    /// The report could not be printed.
    #[error("could not print what was done: {0}")]
    Print(io::Error),
}

/// What `--install` is to do.
#[derive(Debug, PartialEq)]
struct Wish {
    bin_dir: PathBuf,
    /// None: no configuration.
    conf_dir: Option<PathBuf>,
    names: Vec<String>,
    force: bool,
}

#[derive(Debug, PartialEq)]
enum Command {
    Install(Wish),
    Version,
    Help,
}

/// Does what the arguments (without the program's name) say.
pub(crate) fn command_line(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let names = Plugin::ALL.map(Plugin::name).into_iter().filter(|name| *name != BINARY).collect::<Vec<_>>();
    let done = parse(arguments, &names).and_then(|command| {
        let said = match command {
            Command::Install(wish) => install(&wish, Path::new("/proc/self/exe"))?,
            Command::Version => format!("flannel {}\n", env!("CARGO_PKG_VERSION")),
            Command::Help => format!("{HELP}\nNames: {}\n", names.join(", ")),
        };
        let mut stdout = io::stdout().lock();
        stdout.write_all(said.as_bytes()).and_then(|()| stdout.flush()).map_err(Trouble::Print)
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(trouble) => {
            eprintln!("flannel: {trouble}");
            ExitCode::from(if matches!(trouble, Trouble::Usage(_)) { 2 } else { 1 })
        }
    }
}

/// `names`: what can be linked.
fn parse(mut arguments: impl Iterator<Item = OsString>, names: &[&str]) -> Result<Command, Trouble> {
    let usage = |text: String| Err(Trouble::Usage(text));
    let mut wish = Wish {
        bin_dir: "/opt/cni/bin".into(),
        conf_dir: Some("/etc/cni/net.d".into()),
        names: names.iter().map(|&name| name.to_owned()).collect(),
        force: false,
    };
    let (mut install, mut chosen) = (false, false);
    let mut given = Vec::new();
    while let Some(argument) = arguments.next() {
        let argument = argument.to_string_lossy().into_owned();
        let (flag, attached) = match argument.split_once('=') {
            Some((flag, value)) => (flag.to_owned(), Some(OsString::from(value))),
            None => (argument, None),
        };
        let takes_value = matches!(flag.as_str(), "--bin-dir" | "--conf-dir" | "--link");
        if attached.is_some() && !takes_value {
            return usage(format!("{flag} takes no value"));
        }
        let value = if takes_value {
            let value = attached.or_else(|| arguments.next()).filter(|value| !value.is_empty());
            match value {
                Some(value) => value,
                None => return usage(format!("{flag} wants a value")),
            }
        } else {
            OsString::new()
        };
        match flag.as_str() {
            "--help" | "-h" => return Ok(Command::Help),
            "--version" | "-V" => return Ok(Command::Version),
            "--install" => install = true,
            "--bin-dir" => wish.bin_dir = value.into(),
            "--conf-dir" => wish.conf_dir = Some(value.into()),
            "--no-conf" => wish.conf_dir = None,
            "--no-links" => (wish.names, chosen) = (Vec::new(), true),
            "--link" => {
                let name = value.to_string_lossy().into_owned();
                if !names.contains(&name.as_str()) {
                    return usage(format!("--link {name}: the names are {}", names.join(", ")));
                }
                if !std::mem::replace(&mut chosen, true) {
                    wish.names.clear();
                }
                wish.names.push(name);
            }
            "--force" => wish.force = true,
            _ => return usage(format!("{flag} is unknown")),
        }
        given.push(flag);
    }
    let both = |one: &str, other: &str| given.iter().any(|f| f == one) && given.iter().any(|f| f == other);
    if both("--no-conf", "--conf-dir") || both("--no-links", "--link") {
        return usage(format!("{} contradict each other", given.join(" ")));
    }
    match (install, given.first()) {
        (true, _) => Ok(Command::Install(wish)),
        (false, Some(flag)) => usage(format!("{flag} goes with --install")),
        (false, None) => usage("nothing to do".to_owned()),
    }
}

/// Puts everything in place, the configuration last; returns what was done, a line each.
fn install(wish: &Wish, program: &Path) -> Result<String, Trouble> {
    let bytes = fs::read(program).map_err(trouble("read", program))?;
    make_dir(&wish.bin_dir)?;
    let mut report = String::new();
    let mut say = |what: &str, path: &Path, why: &str| {
        // Writing to a String cannot fail.
        let _ = writeln!(report, "{what} {}{why}", path.display());
    };

    let copies = if wish.names.is_empty() { &[BINARY][..] } else { &[BINARY, LINKED] };
    for name in copies {
        let path = wish.bin_dir.join(name);
        if holds(&path, &bytes) {
            say("unchanged", &path, "");
        } else {
            replace(&path, |draft| write(draft, &bytes, 0o755))?;
            say("installed", &path, concat!(" (", env!("CARGO_PKG_VERSION"), ")"));
        }
    }
    for name in &wish.names {
        let path = wish.bin_dir.join(name);
        match occupant(&path)? {
            Occupant::Ours => say("unchanged", &path, ""),
            Occupant::Foreign if !wish.force => {
                say("kept", &path, ": another program's; --force replaces it");
            }
            _ => {
                replace(&path, |draft| symlink(LINKED, draft))?;
                say("linked", &path, "");
            }
        }
    }
    if let Some(dir) = &wish.conf_dir {
        make_dir(dir)?;
        let path = dir.join(CONFLIST);
        match obstacle(dir, &path, wish.force)? {
            Obstacle::Same => say("unchanged", &path, ""),
            Obstacle::Different => say("kept", &path, ": it differs; --force replaces it"),
            Obstacle::Other(other) => {
                say("kept", &other, ": it is a flannel network; --force adds 10-flannel.conflist");
            }
            Obstacle::None => {
                replace(&path, |draft| write(draft, CONFLIST_TEXT.as_bytes(), 0o644))?;
                say("installed", &path, "");
            }
        }
        if let Some(first) = networks(dir)?.into_iter().next().filter(|first| *first != path) {
            say("note:", &first, " comes first; containerd uses that one alone");
        }
    }
    Ok(report)
}

/// What has a name already.
enum Occupant {
    Nobody,
    Ours,
    Foreign,
}

fn occupant(path: &Path) -> Result<Occupant, Trouble> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Occupant::Nobody),
        Err(error) => return Err(trouble("look at", path)(error)),
        Ok(_) => {}
    }
    if fs::read_link(path).is_ok_and(|to| to == Path::new(LINKED)) {
        return Ok(Occupant::Ours);
    }
    // A link that leads nowhere is nobody's program.
    Ok(if path.exists() { Occupant::Foreign } else { Occupant::Nobody })
}

/// Why the configuration is not written.
enum Obstacle {
    None,
    Same,
    Different,
    Other(PathBuf),
}

fn obstacle(dir: &Path, path: &Path, force: bool) -> Result<Obstacle, Trouble> {
    if holds(path, CONFLIST_TEXT.as_bytes()) {
        return Ok(Obstacle::Same);
    }
    if force {
        return Ok(Obstacle::None);
    }
    if path.exists() {
        return Ok(Obstacle::Different);
    }
    let other = networks(dir)?.into_iter().find(|file| is_flannel(file));
    Ok(other.map_or(Obstacle::None, Obstacle::Other))
}

/// The files of a directory that runtimes read, in the order in which they do.
fn networks(dir: &Path) -> Result<Vec<PathBuf>, Trouble> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(trouble("list", dir))? {
        let path = entry.map_err(trouble("list", dir))?.path();
        let extension = path.extension().and_then(|extension| extension.to_str());
        if matches!(extension, Some("conf" | "conflist" | "json")) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Whether a network's first plugin is flannel. What cannot be read is no flannel network.
fn is_flannel(file: &Path) -> bool {
    let Ok(text) = fs::read(file) else { return false };
    let Ok(network) = serde_json::from_slice::<Value>(&text) else { return false };
    let first = network.get("plugins").and_then(|plugins| plugins.get(0)).unwrap_or(&network);
    first.get("type").and_then(Value::as_str) == Some(BINARY)
}

fn holds(path: &Path, bytes: &[u8]) -> bool {
    fs::read(path).is_ok_and(|there| there == bytes)
}

fn make_dir(dir: &Path) -> Result<(), Trouble> {
    fs::create_dir_all(dir).map_err(trouble("make", dir))
}

/// Makes a file or link under a name that no runtime reads, then gives it its own.
fn replace(path: &Path, make: impl FnOnce(&Path) -> io::Result<()>) -> Result<(), Trouble> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let draft = path.with_file_name(format!(".{name}.{}.tmp", process::id()));
    // Of a process that had this number and died.
    let _ = fs::remove_file(&draft);
    let made = make(&draft).and_then(|()| fs::rename(&draft, path)).and_then(|()| sync_dir(path));
    made.map_err(|error| {
        let _ = fs::remove_file(&draft);
        trouble("write", path)(error)
    })
}

fn write(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
    file.write_all(bytes)?;
    // Not at creation, where the umask has a say.
    file.set_permissions(Permissions::from_mode(mode))?;
    file.sync_all()
}

/// A rename lasts when the directory is on the disk.
fn sync_dir(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all())
}

fn trouble(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Trouble {
    let path = path.to_owned();
    move |error| Trouble::File { action, path, error }
}
