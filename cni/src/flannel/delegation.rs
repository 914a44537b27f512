//! The work is another plugin's: it is told what upstream tells it, for every verb, and upstream's file is kept for it.
//!
//! Two things of the configuration that upstream loses on the way are passed on, because nobody who gives them means them to be
//! lost: `dns` and `args`.

use flannel_core::touch::subnet_env::SubnetEnv;
use flannel_core::words::name::Attachment;
use serde_json::{Value, json};

use super::conf::FlannelConf;
use super::scratch::{Kept, Scratch};
use super::subnet_env;
use crate::args::Call;
use crate::bridge::check;
use crate::delegate;
use crate::json::{Object, asks, field};
use crate::plugin::Plugin;
use crate::result::{Answer, CniError};

/// What the plugin is told.
fn told(conf: &FlannelConf<'_>, env: &SubnetEnv) -> Object {
    let mut told = conf.delegated(env);
    for key in ["dns", "args"] {
        if let Some(value) = field(&conf.common.given, key).filter(|value| asks(value))
            && field(&told, key).is_none()
        {
            told.insert(key.to_owned(), value.clone());
        }
    }
    told
}

/// The same with what an earlier call, or plugin, printed. Its version is that of the configuration it comes with.
fn with_result(mut told: Object, conf: &FlannelConf<'_>) -> Value {
    if let Some(previous) = &conf.common.previous {
        told.insert("prevResult".to_owned(), previous.clone());
        told.insert("cniVersion".to_owned(), json!(conf.common.version.text()));
    }
    Value::Object(told)
}

/// ADD. What a plugin that failed may have left is taken back by its own DEL.
pub(super) fn add(
    call: &Call,
    conf: &FlannelConf<'_>,
    env: &SubnetEnv,
    kind: &str,
) -> Result<Answer, CniError> {
    // Of this file, the other plugins are good for the work; this one would hand it to itself for ever.
    if Plugin::called_by(Some(kind.into())) == Plugin::Flannel && delegate::is_this_file(kind, &call.path) {
        return Err(CniError::config(format!(
            "delegate.type is {kind:?}, which is this plugin: leave it out"
        )));
    }
    let told = told(conf, env);
    let scratch = Scratch::of(conf, &call.attachment()?);
    let fresh = scratch.keep(&Value::Object(told.clone()))?;
    let told = with_result(told, conf);
    let done = delegate::run(kind, &call.path, None, &told).map(Answer::Printed);
    if done.is_err() {
        // The runtime's own DEL tries again, with the file or without.
        if let Err(undo) = delegate::run(kind, &call.path, Some("DEL"), &told) {
            say!("flannel: taking back a failed ADD: {undo}");
        }
        if fresh {
            scratch.remove();
        }
    }
    done
}

/// DEL. Without the file there may be something all the same: it is not synced, and a container's interfaces share one.
pub(super) fn del(
    call: &Call,
    conf: &FlannelConf<'_>,
    kind: &str,
    kept: Option<Kept>,
) -> Result<Answer, CniError> {
    match kept {
        Some(kept) => {
            let told = kept.into_object();
            let same = field(&told, "cniVersion").and_then(Value::as_str) == Some(conf.common.version.text());
            let told = if same { with_result(told, conf) } else { Value::Object(told) };
            let printed = delegate::run(kind, &call.path, None, &told)?;
            Scratch::of(conf, &call.attachment()?).remove();
            Ok(Answer::Printed(printed))
        }
        None => {
            if let Ok(env) = subnet_env(conf, CniError::TRY_AGAIN) {
                let told = with_result(told(conf, &env), conf);
                if let Err(error) = delegate::run(kind, &call.path, None, &told) {
                    say!("flannel: nothing is known of this container, and {error}");
                }
            }
            Ok(Answer::Nothing)
        }
    }
}

/// CHECK. Upstream's succeeds always.
pub(super) fn check(
    call: &Call,
    conf: &FlannelConf<'_>,
    kind: &str,
    kept: Option<Kept>,
) -> Result<Answer, CniError> {
    let Some(kept) = kept else {
        let container = call.attachment()?.container;
        return Err(check::drift(format!("nothing is known of container {container}")));
    };
    let told = with_result(kept.into_object(), conf);
    delegate::run(kind, &call.path, None, &told).map(Answer::Printed)
}

/// GC.
pub(super) fn gc(
    call: &Call,
    conf: &FlannelConf<'_>,
    kind: &str,
    valid: &[Attachment],
) -> Result<Answer, CniError> {
    let mut told = told(conf, &subnet_env(conf, CniError::TRY_AGAIN)?);
    let valid: Vec<Value> = valid
        .iter()
        .map(|owner| json!({ "containerID": owner.container, "ifname": owner.interface }))
        .collect();
    // libcni writes both names.
    for key in ["cni.dev/valid-attachments", "cni.dev/attachments"] {
        told.insert(key.to_owned(), json!(valid));
    }
    delegate::run(kind, &call.path, None, &Value::Object(told)).map(Answer::Printed)
}

/// STATUS.
pub(super) fn status(
    call: &Call,
    conf: &FlannelConf<'_>,
    env: &SubnetEnv,
    kind: &str,
) -> Result<Answer, CniError> {
    let told = Value::Object(told(conf, env));
    let told = delegate::run(kind, &call.path, None, &told);
    told.map(Answer::Printed).map_err(|error| match error.code {
        CniError::UNAVAILABLE | CniError::LIMITED => error,
        _ => CniError { code: CniError::UNAVAILABLE, ..error },
    })
}
