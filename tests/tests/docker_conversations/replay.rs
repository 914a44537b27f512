//! Recorded requests sent to a plugin without an engine: it answers them as it did, with addresses of its own.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, bail, ensure};
use flannel_tests::conversation::{Call, PLUGIN_SOCKET};
use flannel_tests::{Host, eventually, secs};
use serde_json::Value;

/// Subnets that the plugin chose when the vector was recorded, and those it chose now: the beginnings of their addresses.
#[derive(Default)]
struct Subnets(Vec<(String, String)>);

impl Subnets {
    fn learn(&mut self, recorded: &Value, now: &Value) {
        let start = |pool: &Value| Some(pool["Pool"].as_str()?.strip_suffix(".0/24")?.to_owned());
        if let (Some(recorded), Some(now)) = (start(recorded), start(now)) {
            self.0.retain(|(known, _)| *known != recorded);
            self.0.push((recorded, now));
        }
    }

    /// A recorded request with the addresses of now.
    fn translate(&self, recorded: &Value) -> String {
        let mut text = recorded.to_string();
        // By way of something that is in no request, or a subnet could be translated twice.
        for (number, (recorded, _)) in self.0.iter().enumerate() {
            text = text.replace(&format!("{recorded}."), &format!("\u{1}{number}\u{1}"));
        }
        for (number, (_, now)) in self.0.iter().enumerate() {
            text = text.replace(&format!("\u{1}{number}\u{1}"), &format!("{now}."));
        }
        text
    }
}

/// Sends a vector to the plugin of a host; the answer is how many calls it holds.
pub(super) fn replay(host: &Host, vector: &str) -> Result<usize> {
    let plugin = host.spawn("flannel-docker-plugin", &["flannel-docker-plugin"], &[])?;
    let socket = host.path(PLUGIN_SOCKET);
    eventually("the plugin listens", secs(10), || UnixStream::connect(&socket).is_ok())
        .with_context(|| plugin.tail())?;
    let mut subnets = Subnets::default();
    let (mut command, mut calls) = (String::new(), 0);
    for line in vector.lines() {
        let entry: Value = serde_json::from_str(line)?;
        if let Some(next) = entry["command"].as_str() {
            command = next.to_owned();
            continue;
        }
        let call: Call = serde_json::from_value(entry)?;
        let body = if call.request.is_null() { String::new() } else { subnets.translate(&call.request) };
        let (status, answer) = post(&socket, &call.method, &body)?;
        let what = || {
            format!(
                "{command}: {} {body}\nnow {status} {answer}\nrecorded {} {}",
                call.method, call.status, call.answer
            )
        };
        ensure!(status == call.status, "another status: {}", what());
        same_shape(&call.answer, &answer, "").with_context(what)?;
        subnets.learn(&call.answer, &answer);
        calls += 1;
    }
    Ok(calls)
}

fn post(socket: &std::path::Path, method: &str, body: &str) -> Result<(u16, Value)> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(secs(20)))?;
    write!(
        stream,
        "POST /{method} HTTP/1.1\r\nHost: \r\nUser-Agent: Go-http-client/1.1\r\nContent-Length: {}\r\n\
         Accept: application/vnd.docker.plugins.v1.2+json\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    let (head, body) = said.split_once("\r\n\r\n").with_context(|| format!("no answer in {said:?}"))?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).context("no status")?;
    Ok((status, serde_json::from_str(body).with_context(|| body.to_owned())?))
}

/// The same keys, and values of the same kinds.
pub(super) fn same_shape(recorded: &Value, now: &Value, place: &str) -> Result<()> {
    match (recorded, now) {
        (Value::Object(recorded), Value::Object(now)) => {
            let keys = |of: &serde_json::Map<String, Value>| of.keys().cloned().collect::<Vec<_>>();
            ensure!(
                keys(recorded) == keys(now),
                "{place}: keys {:?}, recorded {:?}",
                keys(now),
                keys(recorded)
            );
            for (key, value) in recorded {
                same_shape(value, &now[key], &format!("{place}.{key}"))?;
            }
            Ok(())
        }
        (Value::Array(recorded), Value::Array(now)) => {
            ensure!(
                recorded.len() == now.len(),
                "{place}: {} entries, recorded {}",
                now.len(),
                recorded.len()
            );
            recorded
                .iter()
                .zip(now)
                .try_for_each(|(recorded, now)| same_shape(recorded, now, &format!("{place}[]")))
        }
        (Value::String(recorded), Value::String(now)) => {
            ensure!(kind(recorded) == kind(now), "{place}: {now:?}, recorded {recorded:?}");
            Ok(())
        }
        (Value::Number(_), Value::Number(_)) | (Value::Null, Value::Null) => Ok(()),
        (Value::Bool(recorded), Value::Bool(now)) if recorded == now => Ok(()),
        _ => bail!("{place}: {now}, recorded {recorded}"),
    }
}

/// What a text is: an address, a prefix, a MAC, nothing, or anything else.
fn kind(text: &str) -> &'static str {
    let address = |text: &str| text.parse::<std::net::IpAddr>().is_ok();
    match text.split_once('/') {
        _ if text.is_empty() => "nothing",
        _ if address(text) => "address",
        Some((ip, len)) if address(ip) && len.parse::<u8>().is_ok() => "prefix",
        _ if text.len() == 17 && text.split(':').all(|byte| u8::from_str_radix(byte, 16).is_ok()) => "mac",
        _ => "text",
    }
}
