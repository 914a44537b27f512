//! Upstream's chains on a host, from the outside: as `iptables -S` and `nft list` show them, after whoever flushes them, from one mode
//! to the other, and between Go flanneld and this one.

use anyhow::{Result, ensure};
use flannel_tests::flanneld::{Flanneld, SubnetEnv, put_config};
use flannel_tests::{Host, Lab, eventually, in_lab, secs};

const IPTABLES: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan"}}"#;
const NFTABLES: &str = r#"{"Network":"10.100.0.0/16","EnableNFTables":true,"Backend":{"Type":"vxlan"}}"#;
const MASQ: &str = "-m comment --comment \"flanneld masq\"";
const FWD: &str = "-m comment --comment \"flanneld forward\"";

/// The rules of upstream's iptables mode, chain by chain and in order.
fn rules(cidr: &str, subnet: &str) -> [Vec<String>; 2] {
    let nat = [
        format!("POSTROUTING {MASQ} -j FLANNEL-POSTRTG"),
        format!("FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 {MASQ} -j RETURN"),
        format!("FLANNEL-POSTRTG -s {subnet} -d {cidr} {MASQ} -j RETURN"),
        format!("FLANNEL-POSTRTG -s {cidr} -d {subnet} {MASQ} -j RETURN"),
        format!("FLANNEL-POSTRTG ! -s {cidr} -d {subnet} {MASQ} -j RETURN"),
        format!("FLANNEL-POSTRTG -s {cidr} ! -d 224.0.0.0/4 {MASQ} -j MASQUERADE --random-fully"),
        format!("FLANNEL-POSTRTG ! -s {cidr} -d {cidr} {MASQ} -j MASQUERADE --random-fully"),
    ];
    let filter = [
        format!("FORWARD {FWD} -j FLANNEL-FWD"),
        format!("FLANNEL-FWD -s {cidr} {FWD} -j ACCEPT"),
        format!("FLANNEL-FWD -d {cidr} {FWD} -j ACCEPT"),
    ];
    [nat.to_vec(), filter.to_vec()]
}

/// What upstream runs at its start: chains emptied, then every rule, the jump included, taken away if it is there and appended.
fn as_upstream_starts(cidr: &str, subnet: &str) -> String {
    let tables = ["nat", "filter"].into_iter().zip(rules(cidr, subnet)).map(|(table, rules)| {
        let chain = if table == "nat" { "FLANNEL-POSTRTG" } else { "FLANNEL-FWD" };
        let jump = &rules[0];
        let gone = format!("iptables -t {table} -C {jump} 2>/dev/null && jump='-D {jump}' || jump=");
        let lines: Vec<_> = rules.iter().map(|rule| format!("-A {rule}")).collect();
        format!(
            "iptables -t {table} -N {chain} 2>/dev/null || iptables -t {table} -F {chain}\n{gone}\n\
             printf '%s\\n' '*{table}' \"$jump\" '{}' COMMIT | iptables-restore --noflush\n",
            lines.join("' '")
        )
    });
    tables
        .collect::<String>()
        .replace("jump='-D", "jump=\"-D")
        .replace("' || jump=", "\" || jump=")
        .replace(
            "jump=\"-D POSTROUTING -m comment --comment \"flanneld masq\"",
            "jump=\"-D POSTROUTING -m comment --comment \\\"flanneld masq\\\"",
        )
        .replace(
            "jump=\"-D FORWARD -m comment --comment \"flanneld forward\"",
            "jump=\"-D FORWARD -m comment --comment \\\"flanneld forward\\\"",
        )
}

/// `iptables -t nat -S` and `iptables -S` of a host on which nobody else has rules but these in FORWARD.
fn listing(env: &SubnetEnv, policy: &str, others: &str) -> String {
    let [nat, filter] = rules("10.100.0.0/16", &env.subnet());
    let lines = |rules: &[String]| rules.iter().map(|rule| format!("-A {rule}\n")).collect::<String>();
    let mut text =
        "-P PREROUTING ACCEPT\n-P INPUT ACCEPT\n-P OUTPUT ACCEPT\n-P POSTROUTING ACCEPT\n".to_owned();
    text += &format!("-N FLANNEL-POSTRTG\n{}", lines(&nat));
    text += &format!("-P INPUT ACCEPT\n-P FORWARD {policy}\n-P OUTPUT ACCEPT\n-N FLANNEL-FWD\n{others}");
    text + &lines(&filter)
}

/// Without the tunnel guard, which has a table of its own.
fn start(lab: &Lab, host: &Host, flags: &[&str]) -> Result<(Flanneld, SubnetEnv)> {
    let daemon =
        Flanneld::start_with(lab, host, &[&["--iface=eth0", "--tunnel-guard=false"], flags].concat())?;
    let env = daemon.ready()?;
    Ok((daemon, env))
}

fn shows(host: &Host, what: &str, variant: &str, expected: &str) -> Result<()> {
    eventually(format!("{variant} after {what}"), secs(30), || {
        let seen = host.sh(&format!("{variant} -t nat -S; {variant} -S"))?;
        ensure!(seen.trim_end() == expected.trim_end(), "{seen}\ninstead of\n{expected}");
        Ok(())
    })
}

fn nowhere(host: &Host, what: &str, commands: &str) -> Result<()> {
    eventually(format!("nothing is left after {what}"), secs(30), || {
        let seen = host.sh(commands)?;
        ensure!(!seen.to_lowercase().contains("flannel"), "{seen}");
        Ok(())
    })
}

const EVERYWHERE: &str =
    "iptables-nft -t nat -S; iptables-nft -S; iptables-legacy -t nat -S; iptables-legacy -S; nft list tables";

#[test]
fn the_chains_are_upstreams() {
    let plan = Lab::new("fwchains").hosts(1).etcd();
    in_lab(plan.needs(&["iptables-nft", "iptables-legacy", "nft", "strace"]), |lab| {
        put_config(lab, IPTABLES)?;
        let host = lab.host(1);
        host.sh("ln -sf /usr/sbin/iptables-nft /etc/alternatives/iptables; ln -sf /usr/sbin/iptables-nft-restore /etc/alternatives/iptables-restore")?;
        // Another version served another Network here; what it wrote before it had chains is there, too, and its tables of the other mode.
        host.sh("mkdir -p /run/flannel; printf 'FLANNEL_NETWORK=10.99.0.0/16\\nFLANNEL_SUBNET=10.99.3.1/24\\nFLANNEL_MTU=1450\\nFLANNEL_IPMASQ=true\\n' > /run/flannel/subnet.env")?;
        host.sh(&as_upstream_starts("10.99.0.0/16", "10.99.3.0/24"))?;
        host.sh(&format!(
            "iptables -P FORWARD DROP; iptables -A FORWARD -i docker0 -o docker0 -j DROP
             iptables -I FORWARD -s 10.100.0.0/16 {FWD} -j ACCEPT
             iptables -t nat -I POSTROUTING -s 10.99.0.0/16 -d 10.99.0.0/16 {MASQ} -j RETURN
             nft 'add table ip flannel-ipv4; add chain ip flannel-ipv4 forward; add table ip6 flannel-ipv6'"
        ))?;
        let (daemon, env) = start(lab, host, &["--ip-masq", "--iptables-resync=1"])?;
        let others = "-A FORWARD -i docker0 -o docker0 -j DROP\n";
        // Where the jump was, it stays.
        let jump = format!("-A FORWARD {FWD} -j FLANNEL-FWD\n");
        let first = listing(&env, "DROP", "").replace(&jump, &format!("{jump}{others}"));
        shows(host, "the start", "iptables", &first)?;
        let tables = host.out(&["nft", "list", "tables"])?;
        ensure!(!tables.contains("flannel"), "{tables}");

        survives(host, &env, others)?;
        does_not_run_programs(host, &daemon)?;

        put_config(lab, NFTABLES)?;
        eventually("nftables", secs(30), || {
            let seen = host.sh("nft list table ip flannel-ipv4; nft list tables")?;
            let parts = [
                "comment \"rules for flannel-ipv4\"",
                "chain postrtg",
                "masquerade fully-random",
                "chain forward",
            ];
            ensure!(parts.iter().all(|part| seen.contains(part)) && !seen.contains("flannel-ipv6"), "{seen}");
            let iptables = host.sh("iptables -t nat -S; iptables -S")?;
            // Docker's FORWARD drops, whatever a table of nftables accepts.
            ensure!(!iptables.contains("POSTRTG") && iptables.contains("FLANNEL-FWD"), "{iptables}");
            Ok(())
        })?;
        host.sh("iptables -P FORWARD ACCEPT; iptables -F FORWARD")?;
        nowhere(host, "nothing drops any more", "iptables -t nat -S; iptables -S")?;
        host.sh("nft flush ruleset")?;
        eventually("back after a flush", secs(30), || {
            let seen = host.sh("nft list table ip flannel-ipv4")?;
            ensure!(seen.contains("masquerade") && seen.contains("accept"), "{seen}");
            Ok(())
        })?;
        put_config(lab, IPTABLES)?;
        let alone = listing(&env, "ACCEPT", "");
        shows(host, "the way back", "iptables", &alone)?;
        nowhere(host, "the way back", "nft list tables | grep -v 'ip nat\\|ip filter' || true")?;

        // Upstream takes over, and we after it.
        daemon.daemon().stop(secs(10))?;
        for _ in 0..2 {
            host.sh(&as_upstream_starts("10.100.0.0/16", &env.subnet()))?;
            shows(host, "upstream's start", "iptables", &alone)?;
        }
        let (daemon, again) = start(lab, host, &["--ip-masq"])?;
        ensure!(again.subnet() == env.subnet());
        shows(host, "our start", "iptables", &alone)?;
        ensure!(
            daemon.said("chain ").is_empty(),
            "rules are taken over as they are: {:?}",
            daemon.said("chain ")
        );
        daemon.daemon().stop(secs(10))?;

        // The other variant.
        host.sh("ln -sf /usr/sbin/iptables-legacy /etc/alternatives/iptables")?;
        let (daemon, _) = start(lab, host, &["--ip-masq", "--iptables-resync=1"])?;
        shows(host, "the start with the older tables", "iptables-legacy", &alone)?;
        nowhere(host, "the change of variant", "iptables-nft -t nat -S; iptables-nft -S")?;
        for flush in ["-F", "-t nat -F", "-t nat -F; iptables-legacy -t nat -X", "-A FLANNEL-FWD -j DROP"] {
            host.sh(&format!("iptables-legacy {flush}"))?;
            shows(host, flush, "iptables-legacy", &alone)?;
        }
        does_not_run_programs(host, &daemon)?;
        daemon.daemon().stop(secs(10))?;

        // No iptables at all.
        host.sh("rm /etc/alternatives/iptables")?;
        let (daemon, _) = start(lab, host, &["--ip-masq"])?;
        let table = host.out(&["nft", "list", "table", "inet", "flannel"])?;
        ensure!(
            table.contains("masquerade fully-random") && table.contains("ip daddr 10.100.0.0/16 accept"),
            "{table}"
        );
        ensure!(daemon.said("no iptables").len() == 1, "{:?}", daemon.said("no iptables"));
        nowhere(host, "iptables has gone", &EVERYWHERE.replace("; nft list tables", ""))?;
        daemon.daemon().stop(secs(10))?;

        host.sh("ln -sf /usr/sbin/iptables-nft /etc/alternatives/iptables")?;
        let (daemon, _) = start(lab, host, &["--ip-masq", "--ip-masq-fully-random-disable"])?;
        shows(host, "ports are kept", "iptables", &alone.replace(" --random-fully", ""))?;
        daemon.daemon().stop(secs(10))?;
        start(lab, host, &["--iptables-forward-rules=false"])?;
        nowhere(host, "nothing is asked for", EVERYWHERE)
    });
}

/// What takes rules away, in one transaction each: between two commands they would have been repaired already.
fn survives(host: &Host, env: &SubnetEnv, others: &str) -> Result<()> {
    let dropping = listing(env, "DROP", "");
    for (mischief, expected) in [
        ("iptables -F FORWARD", dropping.clone()),
        ("iptables -F", dropping.clone()),
        ("iptables -t nat -F", dropping.clone()),
        ("iptables -t nat -F FLANNEL-POSTRTG", dropping.clone()),
        ("iptables -A FLANNEL-FWD -j DROP", dropping.clone()),
        ("iptables -t nat -D FLANNEL-POSTRTG 3", dropping.clone()),
        ("printf '*filter\\n:FORWARD DROP\\nCOMMIT\\n*nat\\nCOMMIT\\n' | iptables-restore", dropping),
        // As Docker comes up: another's rule in FORWARD, before ours.
        (
            "printf '*filter\\n:FORWARD DROP\\n-A FORWARD -i docker0 -o docker0 -j DROP\\nCOMMIT\\n' | iptables-restore",
            listing(env, "DROP", others),
        ),
    ] {
        host.sh(mischief)?;
        shows(host, mischief, "iptables", &expected)?;
    }
    host.sh("nft flush ruleset")?;
    // The policy of the chain that was made anew.
    shows(host, "flush ruleset", "iptables", &listing(env, "ACCEPT", ""))?;
    host.sh("iptables -P FORWARD DROP").map(drop)
}

/// An idle daemon looks again every second, and runs nothing for that.
fn does_not_run_programs(host: &Host, daemon: &Flanneld) -> Result<()> {
    let passes = || -> Result<u64> {
        let (_, text) = daemon.health("/metrics")?;
        let counts = text.lines().filter(|line| line.starts_with("flannel_passes_total"));
        Ok(counts.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum())
    };
    let pid = daemon.daemon().pid();
    let trace = std::process::Command::new("strace")
        .args(["-qq", "-f", "-e", "trace=execve,fork,vfork", "-o"])
        .arg(host.path("/run/execs"))
        .args(["-p", &pid.to_string()])
        .spawn();
    let mut trace = trace?;
    let looked = passes().and_then(|before| {
        eventually("four looks", secs(30), || {
            ensure!(passes()? >= before + 4, "{} of {before} + 4", passes()?);
            Ok(())
        })
    });
    trace.kill()?;
    trace.wait()?;
    looked?;
    let ran = host.read("/run/execs")?;
    ensure!(ran.is_empty(), "{ran}");
    Ok(())
}
