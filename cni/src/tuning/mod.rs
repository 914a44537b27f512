//! The plugin `tuning`: settings of a container's network and of its interface (upstream: plugins/meta/tuning). What it turns on
//! the interface it turns back at DEL, because the interface may be a real one that outlives the container.

mod pattern;
mod settings;

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use flannel_core::touch::world::kernel::{Device, Kernel, Turn};
use flannel_core::words::addr::Mac;
use flannel_core::words::name::{Attachment, LinkName};
use serde_json::{Value, json};

pub(crate) use self::settings::Settings;
use crate::args::{Call, CniArgs, Verb};
use crate::bridge::check::drift;
use crate::conf::Conf;
use crate::json::{Object, asked, field, flag, number, text};
use crate::previous;
use crate::result::{Answer, CniError};
use crate::sandbox;

/// Where upstream keeps what an interface was like before.
const DATA_DIR: &str = "/run/cni/tuning";

/// Does what the call asks for.
pub(crate) fn run(call: &Call, conf: &Conf) -> Result<Answer, CniError> {
    match call.verb {
        Verb::Add => add(call, conf),
        Verb::Del => del(call, conf),
        Verb::Check => check(call, conf),
        Verb::Gc => gc(conf),
        Verb::Status => Ok(Answer::Nothing),
    }
}

fn add(call: &Call, conf: &Conf) -> Result<Answer, CniError> {
    let (owner, link) = (call.attachment()?, call.link()?);
    let (settings, turn) = (Settings::read(conf, link)?, turn(call, conf)?);
    let mut result = previous::required(conf)?;
    sandbox::refuse_own(call)?;
    let mut inside = Kernel::open_inside(sandbox::open(call)?)?;
    if !settings.is_empty() {
        settings.set(&mut inside)?;
    }
    if turn != Turn::default() {
        let device = inside.device(link)?.ok_or_else(|| no_link(link))?;
        let before = Before::of(conf, &owner)?;
        before.keep(&conf.name, &turn, &device)?;
        if let Err(error) = inside.turn(link, &turn) {
            before.forget();
            return Err(error.into());
        }
        describe(&mut result, link, &turn);
    }
    Ok(Answer::Value(Value::Object(result)))
}

fn del(call: &Call, conf: &Conf) -> Result<Answer, CniError> {
    let before = Before::of(conf, &call.attachment()?)?;
    if let Some(turn) = before.read()
        && let Some(mut inside) = sandbox::find(call)
        && inside.device(call.link()?)?.is_some()
    {
        inside.turn(call.link()?, &turn)?;
    }
    before.forget();
    Ok(Answer::Nothing)
}

fn check(call: &Call, conf: &Conf) -> Result<Answer, CniError> {
    let link = call.link()?;
    let (settings, turn) = (Settings::read(conf, link)?, turn(call, conf)?);
    previous::required(conf)?;
    sandbox::refuse_own(call)?;
    let mut inside = Kernel::open_inside(sandbox::open(call)?)?;
    let mut missing = if settings.is_empty() { Vec::new() } else { settings.missing(&mut inside)? };
    let device = inside.device(link)?.ok_or_else(|| no_link(link))?;
    let is_other = |wanted: Option<bool>, is: bool| wanted.is_some_and(|wanted| wanted != is);
    let on = |wanted: Option<bool>| if wanted == Some(true) { "on" } else { "off" };
    let wrong = [
        (
            turn.mac.is_some() && turn.mac != device.mac,
            format!("address {}", turn.mac.unwrap_or(Mac([0; 6]))),
        ),
        (turn.mtu.is_some_and(|mtu| mtu != device.mtu), format!("mtu {}", turn.mtu.unwrap_or_default())),
        (is_other(turn.promiscuous, device.promiscuous), format!("promisc {}", on(turn.promiscuous))),
        (
            is_other(turn.all_multicast, device.all_multicast),
            format!("allmulticast {}", on(turn.all_multicast)),
        ),
        (
            turn.queue.is_some_and(|queue| queue != device.queue),
            format!("txqueuelen {}", turn.queue.unwrap_or_default()),
        ),
    ];
    let lines =
        wrong.into_iter().filter(|(wrong, _)| *wrong).map(|(_, what)| format!("ip link set {link} {what}"));
    missing.extend(lines);
    if missing.is_empty() { Ok(Answer::Nothing) } else { Err(drift(missing.join("; "))) }
}

/// Forgets what interfaces of dead attachments were like.
fn gc(conf: &Conf) -> Result<Answer, CniError> {
    let Some(valid) = &conf.valid else { return Ok(Answer::Nothing) };
    let alive = valid.iter().map(Before::name).collect::<Vec<_>>();
    let dir = data_dir(conf)?;
    for file in fs::read_dir(&dir).into_iter().flatten().flatten() {
        let before = Before { file: file.path() };
        let name = file.file_name().to_string_lossy().into_owned();
        // Other networks keep theirs in the same place, and so does upstream's plugin, which does not say whose it is.
        if !alive.contains(&name) && before.network().as_deref() == Some(conf.name.as_str()) {
            before.forget();
        }
    }
    Ok(Answer::Nothing)
}

/// What to turn on the interface. `args.cni` outweighs the configuration.
fn turn(call: &Call, conf: &Conf) -> Result<Turn, CniError> {
    let from = |key: &str| if field(&conf.cni_args, key).is_some() { &conf.cni_args } else { &conf.given };
    let small = |key: &str| -> Result<Option<u32>, CniError> {
        let Some(value) = field(from(key), key).filter(|value| !value.is_null()) else { return Ok(None) };
        let value = number(value, key)?;
        u32::try_from(value).map(Some).map_err(|_| CniError::config(format!("{key} {value} is too large")))
    };
    let mac = match conf.mac(&CniArgs::parse(&call.args)?)? {
        Some(mac) => Some(mac),
        None => {
            let wrong = |mac: &str| CniError::config(format!("invalid args {mac} for MAC addr"));
            text(&conf.given, "mac")?.map(|mac| mac.parse().map_err(|_| wrong(&mac))).transpose()?
        }
    };
    Ok(Turn {
        mac,
        mtu: small("mtu")?.filter(|mtu| *mtu != 0),
        // Only on can be asked for.
        promiscuous: flag(from("promisc"), "promisc")?.filter(|on| *on),
        all_multicast: flag(from("allmulti"), "allmulti")?,
        queue: small("txQLen")?,
        up: None,
    })
}

/// Says in the result what the interface is like now.
fn describe(result: &mut Object, link: LinkName, turn: &Turn) {
    let Some(Value::Array(interfaces)) = result.get_mut("interfaces") else { return };
    for interface in interfaces.iter_mut().filter_map(Value::as_object_mut) {
        if interface.get("name").and_then(Value::as_str) != Some(link.as_str()) {
            continue;
        }
        if let Some(mac) = turn.mac {
            interface.insert("mac".to_owned(), json!(mac.to_string()));
        }
        if let (Some(mtu), true) = (turn.mtu, interface.contains_key("mtu")) {
            interface.insert("mtu".to_owned(), json!(mtu));
        }
    }
}

fn data_dir(conf: &Conf) -> Result<PathBuf, CniError> {
    Ok(text(&conf.given, "dataDir")?.map_or_else(|| PathBuf::from(DATA_DIR), PathBuf::from))
}

/// The file that says what an interface was like before, in upstream's format, with the network's name added.
struct Before {
    file: PathBuf,
}

impl Before {
    fn of(conf: &Conf, owner: &Attachment) -> Result<Self, CniError> {
        Ok(Self { file: data_dir(conf)?.join(Self::name(owner)) })
    }

    fn name(owner: &Attachment) -> String {
        format!("{}_{}.json", owner.container, owner.interface)
    }

    /// Keeps what is going to be turned.
    fn keep(&self, network: &str, turn: &Turn, device: &Device) -> Result<(), CniError> {
        let mut before = json!({ "network": network });
        let mut put = |key: &str, turned: bool, value: Value| {
            if turned {
                before[key] = value;
            }
        };
        put("mac", turn.mac.is_some(), json!(device.mac.map(|mac| mac.to_string())));
        put("mtu", turn.mtu.is_some(), json!(device.mtu));
        put("promisc", turn.promiscuous.is_some(), json!(device.promiscuous));
        put("allmulti", turn.all_multicast.is_some(), json!(device.all_multicast));
        put("txQLen", turn.queue.is_some(), json!(device.queue));
        let write = || -> io::Result<()> {
            let dir = self.file.parent().unwrap_or_else(|| Path::new("/"));
            fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
            fs::write(&self.file, before.to_string())
        };
        write().map_err(|error| {
            CniError::new(CniError::INPUT, format!("could not write {}", self.file.display()))
                .with_details(error.to_string())
        })
    }

    fn object(&self) -> Option<Object> {
        serde_json::from_slice(&fs::read(&self.file).ok()?).ok()
    }

    fn network(&self) -> Option<String> {
        Some(field(&self.object()?, "network")?.as_str()?.to_owned())
    }

    /// How to turn it back; none if there is nothing that can be read.
    fn read(&self) -> Option<Turn> {
        let before = self.object()?;
        let small =
            |key| asked(&before, key).and_then(Value::as_u64).and_then(|value| u32::try_from(value).ok());
        let is_on = |key| field(&before, key).and_then(Value::as_bool);
        Some(Turn {
            mac: field(&before, "mac").and_then(Value::as_str).and_then(|mac| mac.parse().ok()),
            mtu: small("mtu"),
            promiscuous: is_on("promisc"),
            all_multicast: is_on("allmulti"),
            queue: field(&before, "txQLen")
                .and_then(Value::as_u64)
                .and_then(|value| u32::try_from(value).ok()),
            up: None,
        })
    }

    fn forget(&self) {
        if let Err(error) = fs::remove_file(&self.file)
            && error.kind() != ErrorKind::NotFound
        {
            say!("tuning: could not remove {}: {error}", self.file.display());
        }
    }
}

fn no_link(link: LinkName) -> CniError {
    CniError::config(format!("there is no interface {link} in the container"))
}
