//! Backend vxlan, as a measure of the others: what fails here too is not theirs.

use anyhow::Result;
use flannel_tests::flanneld::{Flanneld, Pod, put_config};
use flannel_tests::{Lab, in_lab, ping_within, secs};

#[test]
#[ignore = "inside the virtual machine"]
fn three_hosts() {
    in_lab(Lab::new("vxlan").hosts(3).etcd(), |lab| {
        put_config(lab, r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan"}}"#)?;
        let daemons = Flanneld::start_all(lab)?;
        let pod = |daemon: &Flanneld| Pod::new(daemon.host(), &daemon.ready()?, 2);
        let pods = daemons.iter().map(pod).collect::<Result<Vec<_>>>()?;
        for from in &pods {
            for to in &pods {
                ping_within(secs(5), from, to.ip())?;
            }
        }
        Ok(())
    });
}
