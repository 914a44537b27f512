//! Conversations between a real engine and the plugin, recorded once and replayed without an engine.
//!
//! To record them again: `FLANNEL_RECORD=1 cargo nextest run -p flannel-tests --profile long --test docker_conversations -E 'test(=record)'`; a scene's name in place of 1 records that one.

mod record;
mod replay;
mod scenes;

use std::fs;

use anyhow::{Context, Result, ensure};
use flannel_tests::{Lab, in_lab};
use serde_json::json;

use scenes::SCENES;

#[test]
fn recorded_conversations_are_answered_as_they_were() {
    for scene in SCENES {
        in_lab(Lab::new("replay").hosts(1), |lab| {
            let path = record::file(scene.name);
            let vector = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            let calls =
                replay::replay(lab.host(1), &vector).with_context(|| format!("scene {}", scene.name))?;
            ensure!(calls > 10, "{}: only {calls} calls", path.display());
            Ok(())
        });
    }
}

/// Writes the vectors anew, where that is asked for.
#[test]
fn record() {
    let Ok(wanted) = std::env::var("FLANNEL_RECORD") else { return };
    for scene in SCENES.iter().filter(|scene| wanted == "1" || wanted == scene.name) {
        let plan =
            Lab::new("record").hosts(1).ip_forward(false).needs(&["dockerd", "docker", "docker-compose"]);
        in_lab(plan, |lab| {
            let calls = record::record(lab.host(1), scene)?;
            eprintln!("{}: {calls} calls", scene.name);
            Ok(())
        });
    }
}

#[test]
fn a_shape_is_told_from_another() -> Result<()> {
    let same = |recorded, now| replay::same_shape(&recorded, &now, "");
    same(json!({"Address": "10.1.2.3/24", "Data": {}}), json!({"Address": "10.9.9.9/16", "Data": {}}))?;
    for (recorded, now) in [
        (json!({"A": 1}), json!({"A": "1"})),
        (json!({"A": 1}), json!({"A": 1, "B": 2})),
        (json!({"A": "10.1.2.3"}), json!({"A": "10.1.2.3/24"})),
        (json!({"A": "0a:58:0a:64:05:02"}), json!({"A": ""})),
        (json!({"A": []}), json!({"A": [1]})),
        (json!({"A": true}), json!({"A": false})),
        (json!({}), json!(null)),
    ] {
        ensure!(same(recorded.clone(), now.clone()).is_err(), "{recorded} and {now}");
    }
    Ok(())
}
