//! Scenes played with a real engine; what it says to the plugin becomes the committed vectors.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use flannel_tests::conversation::{HIDDEN_SOCKET, Proxy};
use flannel_tests::{Host, eventually, secs};
use serde_json::json;

use super::scenes::{Act, COMPOSE, Scene};

/// Where a scene's vector is committed.
pub(super) fn file(scene: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/conversations")).join(format!("{scene}.jsonl"))
}

/// Plays a scene and writes its vector: a line for each command and each call.
pub(super) fn record(host: &Host, scene: &Scene) -> Result<usize> {
    host.write("/etc/docker/daemon.json", scene.daemon)?;
    let proxy = Proxy::start(host)?;
    let plugin = host.spawn(
        "flannel-docker-plugin",
        &["flannel-docker-plugin", &format!("--socket={HIDDEN_SOCKET}")],
        &[],
    )?;
    eventually("the plugin listens", secs(10), || host.exists(HIDDEN_SOCKET))
        .with_context(|| plugin.tail())?;
    let mut engine = host.start_dockerd(&[])?;
    host.load_image()?;
    let mut text = String::new();
    for act in scene.acts {
        let (shown, wanted, output) = match act {
            Act::Docker(line) | Act::Refused(line) => {
                let line = leased(host, line);
                let argv: Vec<&str> = std::iter::once("docker").chain(line.split(' ')).collect();
                let output = host.run_for(secs(100), &argv)?;
                (format!("docker {line}"), matches!(act, Act::Docker(_)), Some(output))
            }
            Act::Compose(line) => {
                host.write("/run/lab/compose/docker-compose.yml", leased(host, COMPOSE))?;
                let script = format!("cd /run/lab/compose && docker-compose -p lab {line}");
                let output = host.run_for(secs(100), &["sh", "-ec", &script])?;
                (format!("docker-compose {line}"), true, Some(output))
            }
            Act::RestartEngine | Act::CrashEngine => {
                match act {
                    Act::CrashEngine => engine.crash()?,
                    _ => drop(engine.stop(secs(60))?),
                }
                engine = host.start_dockerd(&[])?;
                (format!("{act:?}"), true, None)
            }
        };
        if let Some(output) = output {
            ensure!(output.ok() == wanted, "{}: {shown}: {output}\n{}", scene.name, plugin.tail());
        }
        settled(&proxy)?;
        writeln!(text, "{}", json!({"command": shown}))?;
        for call in proxy.take() {
            ensure!(call.status != 0, "{}: {shown}: no answer to {call:?}", scene.name);
            writeln!(text, "{}", serde_json::to_string(&call)?)?;
        }
    }
    let calls = text.lines().filter(|line| line.contains("\"method\"")).count();
    let path = file(scene.name);
    path.parent().map_or(Ok(()), fs::create_dir_all)?;
    fs::write(&path, text).with_context(|| path.display().to_string())?;
    Ok(calls)
}

/// An engine may still be tearing down when its command has ended.
fn settled(proxy: &Proxy) -> Result<()> {
    let mut before = usize::MAX;
    eventually("the engine is quiet", secs(30), || {
        let count = proxy.count();
        std::thread::sleep(std::time::Duration::from_millis(300));
        std::mem::replace(&mut before, count) == count
    })
}

fn leased(host: &Host, text: &str) -> String {
    let env = host.read("/run/flannel/subnet.env").unwrap_or_default();
    let subnet = env.lines().find_map(|line| line.strip_prefix("FLANNEL_SUBNET=")?.rsplit_once('.'));
    text.replace("LEASE", subnet.map_or("LEASE", |(bytes, _)| bytes))
}
