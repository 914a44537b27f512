//! A node and the calls a runtime makes on it.

use std::fs::{self, File};
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, ensure};
use flannel_tests::{Host, Lab, LabPlan, Output};
use serde_json::{Value, json};

pub(crate) const LEDGER: &str = "/var/lib/cni/networks/cbr0";
pub(crate) const DEBIAN: &str = "/usr/lib/cni";
pub(crate) const V4: &str =
    "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";

/// A node with a lease and without any daemon: the plugin needs none.
pub(crate) struct Node<'a> {
    pub(crate) host: &'a Host,
}

/// One call of a plugin.
pub(crate) struct Call<'a> {
    pub(crate) verb: &'a str,
    pub(crate) id: &'a str,
    pub(crate) netns: String,
    pub(crate) ifname: &'a str,
    pub(crate) args: &'a str,
    pub(crate) plugin: &'a str,
}

impl<'a> Call<'a> {
    pub(crate) fn new(verb: &'a str, id: &'a str) -> Self {
        let netns = format!("/run/netns/{id}");
        Self { verb, id, netns, ifname: "eth0", args: "", plugin: "flannel" }
    }
}

impl<'a> Node<'a> {
    pub(crate) fn new(host: &'a Host) -> Result<Self> {
        host.write("/run/flannel/subnet.env", V4)?;
        Ok(Self { host })
    }

    /// As kube-flannel ships it.
    pub(crate) fn conf() -> Value {
        json!({ "name": "cbr0", "cniVersion": "1.0.0", "type": "flannel",
                "delegate": { "hairpinMode": true, "isDefaultGateway": true } })
    }

    pub(crate) fn container(&self, id: &str) -> Result<()> {
        self.host.sh(&format!("ip netns add {id}; ip -n {id} link set lo up")).map(drop)
    }

    pub(crate) fn call(&self, call: &Call<'_>, conf: &Value) -> Result<Output> {
        static CALLS: AtomicUsize = AtomicUsize::new(0);
        let file = format!("/run/conf.{}", CALLS.fetch_add(1, Ordering::Relaxed));
        self.host.write(&file, conf.to_string())?;
        let env = [
            format!("CNI_COMMAND={}", call.verb),
            format!("CNI_CONTAINERID={}", call.id),
            format!("CNI_NETNS={}", call.netns),
            format!("CNI_IFNAME={}", call.ifname),
            format!("CNI_ARGS={}", call.args),
            format!("CNI_PATH=/opt/cni/bin:{DEBIAN}"),
        ];
        let argv: Vec<&str> =
            ["env"].into_iter().chain(env.iter().map(String::as_str)).chain([call.plugin]).collect();
        let path = self.host.path(&file);
        let output = self.host.run_input(&argv, File::open(&path)?)?;
        fs::remove_file(path)?;
        Ok(output)
    }

    pub(crate) fn add(&self, id: &str, conf: &Value) -> Result<Value> {
        answer(&self.call(&Call::new("ADD", id), conf)?)
    }

    pub(crate) fn del(&self, id: &str, conf: &Value) -> Result<()> {
        done(&self.call(&Call::new("DEL", id), conf)?)
    }

    /// Addresses in the ledger.
    pub(crate) fn ledger(&self) -> Result<Vec<String>> {
        let script = format!("cd {LEDGER} 2>/dev/null && ls | grep -E '^[0-9a-f]*[.:].*[.:]' || true");
        Ok(self.host.sh(&script)?.split_whitespace().map(str::to_owned).collect())
    }

    pub(crate) fn ping(&self, id: &str, to: &str) -> Result<()> {
        let ping = self.host.run(&["ip", "netns", "exec", id, "ping", "-c", "1", "-W", "2", to])?;
        ensure!(ping.ok(), "{ping}");
        Ok(())
    }

    pub(crate) fn links(&self) -> Result<String> {
        self.host.sh("ip -o link | cut -d: -f2 | cut -d@ -f1")
    }
}

pub(crate) fn answer(output: &Output) -> Result<Value> {
    ensure!(output.ok(), "{output}");
    serde_json::from_str(&output.stdout).with_context(|| output.to_string())
}

/// Commands other than ADD print nothing.
pub(crate) fn done(output: &Output) -> Result<()> {
    ensure!(output.ok() && output.stdout.is_empty(), "{output}");
    Ok(())
}

/// The error printed on stdout: code, and the whole text.
pub(crate) fn error(output: &Output) -> Result<(u64, String)> {
    ensure!(!output.ok(), "it did not fail: {output}");
    let error: Value = serde_json::from_str(&output.stdout).with_context(|| output.to_string())?;
    let code = error["code"].as_u64().with_context(|| output.to_string())?;
    ensure!(error["cniVersion"].is_string(), "{error}");
    Ok((code, format!("{} {}", error["msg"].as_str().unwrap_or(""), error["details"].as_str().unwrap_or(""))))
}

pub(crate) fn ip_of(result: &Value) -> String {
    let cidr = result["ips"][0]["address"].as_str().unwrap_or_default();
    cidr.split('/').next().unwrap_or_default().to_owned()
}

pub(crate) fn with(base: &Value, key: &str, value: Value) -> Value {
    let mut conf = base.clone();
    conf[key] = value;
    conf
}

/// The binary under test by the name of another plugin, as `flannel --install` leaves it.
pub(crate) fn ours(host: &Host, plugin: &str) -> Result<String> {
    let path = format!("/run/ours/{plugin}");
    host.sh(&format!("mkdir -p /run/ours; ln -sf \"$(command -v flannel)\" {path}"))?;
    Ok(path)
}

pub(crate) fn one_host(name: &str) -> LabPlan {
    Lab::new(name).hosts(1).ip_forward(false)
}
