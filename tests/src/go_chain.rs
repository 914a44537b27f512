//! A node as kube-flannel leaves it, with plugins in Go: Debian has all of them but `flannel`.

use anyhow::Result;

use crate::host::Host;

/// What upstream's `flannel` does: it writes down what the bridge plugin is to get, and executes that. Its own configuration is
/// not asked: the delegate's follows from subnet.env (whose subnet is a /24).
pub const GO_FLANNEL: &str = r#"#!/bin/sh -e
kept=/var/lib/cni/flannel/$CNI_CONTAINERID
case $CNI_COMMAND in
    ADD)
        . /run/flannel/subnet.env
        mkdir -p /var/lib/cni/flannel
        echo '{"cniVersion":"0.3.1","name":"cbr0","type":"bridge","mtu":'$FLANNEL_MTU',"hairpinMode":true,"isGateway":true,
            "isDefaultGateway":true,"ipMasq":false,"ipam":{"type":"host-local","routes":[{"dst":"'$FLANNEL_NETWORK'"}],
            "ranges":[[{"subnet":"'${FLANNEL_SUBNET%.*}.0/24'"}]]}}' > "$kept"
        exec /opt/cni/bin/bridge < "$kept" ;;
    DEL)
        [ -e "$kept" ] || exit 0
        /opt/cni/bin/bridge < "$kept"
        rm "$kept" ;;
    *) echo '{"cniVersion":"1.0.0","supportedVersions":["0.3.1","0.4.0","1.0.0"]}' ;;
esac
"#;

/// The conflist of kube-flannel's ConfigMap.
pub const KUBE_FLANNEL: &str = r#"{ "name": "cbr0", "cniVersion": "0.3.1", "plugins": [
    { "type": "flannel", "delegate": { "hairpinMode": true, "isDefaultGateway": true } },
    { "type": "portmap", "capabilities": { "portMappings": true } } ] }"#;

impl Host {
    /// Puts Go's plugins and kube-flannel's conflist where runtimes look, as files of their own.
    pub fn install_go_chain(&self) -> Result<()> {
        self.sh("cp /usr/lib/cni/* /opt/cni/bin/")?;
        self.write("/opt/cni/bin/flannel", GO_FLANNEL)?;
        self.sh("chmod 755 /opt/cni/bin/flannel")?;
        self.write("/etc/cni/net.d/10-flannel.conflist", KUBE_FLANNEL)
    }
}
