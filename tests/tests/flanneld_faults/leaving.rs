//! Leaving a host without a trace, and a command line that cannot be served.

use std::collections::BTreeMap;
use std::process::Command;

use anyhow::{Result, ensure};
use flannel_tests::flanneld::{Flanneld, Pod, SubnetEnv, leases, put_config};
use flannel_tests::{Host, Lab, binaries, eventually, in_lab, ping_within, secs, unchanged};

use crate::{FOLLOW, VXLAN};

#[test]
fn cleanup_leaves_nothing() {
    in_lab(Lab::new("cleanup").etcd(), |lab| {
        put_config(lab, VXLAN)?;
        let (h1, h2) = (lab.host(1), lab.host(2));
        for host in [h1, h2] {
            // A firewall of the host's own, which must be as before as well.
            host.sh("iptables -N MINE; iptables -A FORWARD -j MINE; iptables -P FORWARD DROP; \
                iptables -t nat -N MINE; iptables -t nat -A POSTROUTING -j MINE; \
                nft add table inet mine; nft add chain inet mine c")?;
        }
        let before = [everything(h1)?, everything(h2)?];
        let daemons = Flanneld::start_all(lab)?;
        let env = SubnetEnv::read(h1)?;
        let pods = [Pod::new(h1, &env, 2)?, Pod::new(h2, &SubnetEnv::read(h2)?, 2)?];
        // Through a FORWARD chain that drops.
        ping_within(FOLLOW, &pods[0], pods[1].ip())?;
        for pod in pods {
            pod.remove()?;
        }
        let endpoints = format!("--etcd-endpoints={}", lab.etcd_endpoint());
        let cleanup = ["flanneld", &endpoints, "--cleanup"];

        let said = h1.run(&cleanup)?;
        ensure!(!said.ok() && said.all().contains("stop it first"), "beside a running flanneld: {said}");
        eventually("still ready", secs(2), || daemons[0].health("/readyz").is_ok_and(|said| said.0 == 200))?;

        daemons[0].daemon().stop(secs(5))?;
        h1.out(&cleanup)?;
        unchanged("h1", &before[0], &everything(h1)?)?;
        ensure!(!leases(lab)?.contains_key(&env.key()), "{:?}", leases(lab)?);
        ensure!(leases(lab)?.len() == 1);
        eventually("h2 forgets h1", FOLLOW, || {
            let routes = h2.out(&["ip", "route"])?;
            ensure!(!routes.contains("flannel"), "{routes}");
            Ok(())
        })?;
        // Twice is once.
        h1.out(&cleanup)?;
        unchanged("h1", &before[0], &everything(h1)?)?;

        // After a crash, and without etcd.
        daemons[1].daemon().crash()?;
        lab.etcd_stop()?;
        let said = h2.run(&cleanup)?;
        ensure!(said.ok() && said.all().contains("lease"), "{said}");
        unchanged("h2", &before[1], &everything(h2)?)?;

        // Coming back is as coming for the first time.
        lab.etcd_start()?;
        Flanneld::start(lab, h1)?.ready()?;
        Ok(())
    });
}

/// The kernel's state and the files that anything of flannel may have left.
fn everything(host: &Host) -> Result<String> {
    let files = host.sh(
        "for d in /run/flannel /var/lib/flannel /var/lib/cni /run/docker/plugins /etc/cni; do find $d 2>/dev/null || true; done; \
         cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv4/conf/all/rp_filter /proc/sys/net/ipv4/conf/default/rp_filter",
    )?;
    Ok(format!("{}\n{files}", host.network_state()?))
}

#[test]
fn what_cannot_be_served_is_refused_by_name() {
    let Ok(flanneld) = binaries::path("flanneld") else { panic!("flanneld is not built") };
    let run = |arguments: &[&str], env: &[(&str, &str)]| {
        let envs: BTreeMap<_, _> = env.iter().copied().collect();
        let output =
            Command::new(&flanneld).args(arguments).env_clear().envs(envs).output().expect("flanneld runs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned(), said)
    };
    for (arguments, env, named) in [
        (&["--kube-subnet-mgr"][..], &[][..], "--kube-subnet-mgr belongs to the Kubernetes store"),
        (&["-ip-masq", "--kubeconfig-file=/x"], &[], "--kubeconfig-file belongs to the Kubernetes store"),
        (&[], &[("FLANNELD_VMODULE", "main=3")], "FLANNELD_VMODULE names source files"),
        (&["-remote=10.0.0.1:8888"], &[], "--remote belongs to the client and server of flannel up to 0.7"),
        (&["-networks=blue"], &[], "--networks served several networks"),
        (&["-logtostderr=true"], &[], "--logtostderr says where the Go program logs"),
        (&["-iface-regex=eth("], &[], "--iface-regex"),
        (&[], &[("FLANNELD_IFACE_CAN_REACH", "eth0")], "FLANNELD_IFACE_CAN_REACH"),
        (&["--iptables-resync=0"], &[], "--iptables-resync"),
        (&["--ip-masq", "false"], &[], "'false'"),
        (&["--etcd-username=root"], &[], "--etcd-password"),
        (&["completions", "tcsh"], &[], "tcsh"),
        (&["--no-such-flag"], &[], "--no-such-flag"),
        (&["--subnet-lease-renew-margin=0"], &[], "--subnet-lease-renew-margin"),
        (&[], &[("FLANNELD_SUBNET_LEASE_RENEW_MARGIN", "1440")], "FLANNELD_SUBNET_LEASE_RENEW_MARGIN"),
        (&["--public-ip=somewhere"], &[], "--public-ip"),
        (&["--public-ipv6=fe80::1"], &[], "--public-ipv6"),
        (&["--etcd-endpoints=unix:///run/etcd"], &[], "must begin with http://"),
        (&["--etcd-endpoints=http://10.0.0.5:2379,http://::1:2379"], &[], "stands in brackets"),
        (&["--etcd-endpoints=https://[::1]:1", "--etcd-cafile=/nowhere/ca"], &[], "etcd-cafile /nowhere/ca"),
    ] {
        let (code, stdout, stderr) = run(arguments, env);
        assert_eq!((code, stdout.as_str()), (Some(2), ""), "{arguments:?} {env:?}: {stderr}");
        assert!(stderr.contains(named), "{arguments:?} {env:?}: {named:?} is not in: {stderr}");
    }
    let no_text = std::os::unix::ffi::OsStrExt::from_bytes(b"--etcd-prefix=\xff");
    let output = Command::new(&flanneld).arg::<&std::ffi::OsStr>(no_text).output().expect("flanneld runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(2) && said.contains("is not text in UTF-8"), "{said}");
    let (code, stdout, _) = run(&["-version"], &[]);
    assert!(code == Some(0) && stdout.contains(env!("CARGO_PKG_VERSION")), "{code:?} {stdout}");
    let (code, stdout, _) = run(&["completions", "bash"], &[]);
    assert!(code == Some(0) && stdout.contains("complete -F _flanneld"), "{stdout}");
    let (code, stdout, _) = run(&["--help"], &[]);
    assert!(
        code == Some(0) && stdout.contains("--etcd-endpoints") && stdout.contains("--cleanup"),
        "{stdout}"
    );
}
