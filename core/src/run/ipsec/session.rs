//! A talk with one charon: what it has of ours, and what it is told.
//!
//! **Values** — upstream pkg/backend/ipsec/handle_charon.go, as swanctl.conf(5) names them. Three differ: a key
//! belongs to both addresses, not to each of them alone, so that it is never taken for a connection of somebody else's; it has a
//! name, so that it can be taken away again; and tunnels do not move to other addresses by themselves (MOBIKE, RFC 4555), which peers
//! agree to do without.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use super::client::{Client, ViciError};
use super::message::{Request, Section};
use crate::decide::associations::{Held, Stage, Step, steps};
use crate::words::addr::Prefix;
use crate::words::ipsec::{Associations, Connection, IpsecConfig, REQID};

/// How the two charons talk to each other.
const IKE_PROPOSAL: &str = "aes256-sha256-modp4096";

/// How long a connection that was begun is left alone before it is begun again; twice as long each time.
const AGAIN: Duration = Duration::from_secs(5);
const AGAIN_MAX: Duration = Duration::from_secs(60);

/// Talks to one charon for as long as that runs.
pub(super) struct Session {
    client: Client,
    registered: bool,
    /// What it was told, and with what.
    told: BTreeSet<Connection>,
    with: Option<IpsecConfig>,
    /// Connections that were begun and are not up: when last, and how often.
    begun: BTreeMap<Connection, (Instant, u32)>,
}

impl Session {
    pub(super) fn new(client: Client) -> Self {
        Self { client, registered: false, told: BTreeSet::new(), with: None, begun: BTreeMap::new() }
    }

    /// Makes charon hold what is wanted, and says how far the tunnels were before. What is refused does not keep the rest from being told;
    /// the first refusal is the error then.
    pub(super) async fn converge(
        &mut self,
        wanted: Option<&Associations>,
        networks: &BTreeSet<Prefix>,
    ) -> Result<BTreeMap<Connection, Stage>, ViciError> {
        if self.with.as_ref() != wanted.map(|wanted| &wanted.config) {
            self.told.clear();
            self.with = wanted.map(|wanted| wanted.config.clone());
        }
        let held = self.look().await?;
        self.begun.retain(|connection, _| held.tunnels.get(connection) != Some(&Stage::Up));
        let mut refused = None;
        for step in steps(wanted, networks, &held, &self.told) {
            if let Step::Initiate(connection) = step
                && !self.is_due(&connection)
            {
                continue;
            }
            match self.take(step, wanted).await {
                Ok(()) => {}
                Err(error) if error.is_refusal() => refused = refused.or(Some(error)),
                Err(error) => return Err(error),
            }
        }
        match refused {
            Some(error) => Err(error),
            None => Ok(held.tunnels),
        }
    }

    fn is_due(&self, connection: &Connection) -> bool {
        self.begun.get(connection).is_none_or(|(last, times)| {
            last.elapsed() >= AGAIN.saturating_mul(1 << (*times).min(8)).min(AGAIN_MAX)
        })
    }

    fn begins(&mut self, connection: Connection) {
        let times = self.begun.get(&connection).map_or(0, |(_, times)| times.saturating_add(1));
        self.begun.insert(connection, (Instant::now(), times));
    }

    async fn look(&mut self) -> Result<Held, ViciError> {
        if !self.registered {
            self.client.register("list-sa").await?;
            self.registered = true;
        }
        let none = Request::default();
        let named = |section: &Section, list: &str, parse: fn(&str) -> Option<Connection>| {
            section.lists.get(list).into_iter().flatten().filter_map(|name| parse(name)).collect()
        };
        let keys = named(&self.client.ask("get-shared", &none).await?, "keys", Connection::parse_key);
        let connections = named(&self.client.ask("get-conns", &none).await?, "conns", Connection::parse);
        let mut tunnels = BTreeMap::new();
        let take = |event: Section| {
            for (name, association) in &event.sections {
                if let Some(connection) = Connection::parse(name) {
                    let stage = tunnels.entry(connection).or_insert(Stage::Idle);
                    *stage = (*stage).max(stage_of(association));
                }
            }
        };
        self.client.stream("list-sas", &none, take).await?;
        Ok(Held { keys, connections, tunnels })
    }

    async fn take(&mut self, step: Step, wanted: Option<&Associations>) -> Result<(), ViciError> {
        match (step, wanted) {
            (Step::Unload(connection), _) => {
                tracing::info!("Unloaded connection: {connection}");
                let request = Request::default().value("name", &connection.to_string());
                self.told.remove(&connection);
                self.client.ask("unload-conn", &request).await.map(drop)
            }
            (Step::Terminate(connection), _) => {
                // Without waiting for a peer that is gone.
                let request = Request::default()
                    .value("ike", &connection.to_string())
                    .value("force", "yes")
                    .value("timeout", "-1");
                let ended = self.client.ask("terminate", &request).await;
                // Unloading may have done it.
                ended.map(drop).or_else(|error| if error.is_refusal() { Ok(()) } else { Err(error) })
            }
            (Step::UnloadKey(connection), _) => {
                let request = Request::default().value("id", &connection.key());
                self.client.ask("unload-shared", &request).await.map(drop)
            }
            (Step::LoadKey(connection), Some(wanted)) => {
                self.client.ask("load-shared", &key(&connection, &wanted.config)).await.map(drop)
            }
            (Step::Load(connection), Some(wanted)) => {
                let request = Request::default()
                    .section(&connection.to_string(), particulars(&connection, &wanted.config));
                self.begins(connection);
                self.client.ask("load-conn", &request).await?;
                if self.told.insert(connection) {
                    tracing::info!("Loaded connection: {connection}");
                }
                Ok(())
            }
            (Step::Initiate(connection), _) => {
                self.begins(connection);
                let request = Request::default()
                    .value("child", &connection.child())
                    .value("ike", &connection.to_string())
                    .value("timeout", "-1");
                self.client.ask("initiate", &request).await.map(drop)
            }
            (Step::LoadKey(_) | Step::Load(_), None) => Ok(()),
        }
    }
}

fn stage_of(association: &Section) -> Stage {
    // A child that is being replaced carries packets until the new one does (strongSwan src/libcharon/sa/child_sa.c).
    let carries = |child: &Section| {
        matches!(child.text("state"), "INSTALLED" | "UPDATING" | "REKEYING" | "REKEYED" | "RETRYING")
    };
    let children = association.sections.get("child-sas");
    if children.is_some_and(|children| children.sections.values().any(carries)) {
        return Stage::Up;
    }
    match association.text("state") {
        "CREATED" | "CONNECTING" => Stage::Talking,
        _ => Stage::Idle,
    }
}

fn key(connection: &Connection, config: &IpsecConfig) -> Request {
    let owners = [connection.local.to_string(), connection.remote.to_string()];
    Request::default()
        .value("id", &connection.key())
        .value("type", "IKE")
        .value("data", config.psk.reveal())
        .list("owners", &owners.each_ref().map(String::as_str))
}

fn particulars(connection: &Connection, config: &IpsecConfig) -> Request {
    let psk = || Request::default().value("auth", "psk");
    let subnets = [connection.own.to_string(), connection.subnet.to_string()];
    let [own, subnet] = subnets.each_ref().map(String::as_str);
    let child = Request::default()
        .list("local_ts", &[own])
        .list("remote_ts", &[subnet])
        .list("esp_proposals", &[&config.esp_proposal])
        .value("mode", "tunnel")
        .value("reqid", &REQID.to_string())
        .value("start_action", "start")
        .value("close_action", "trap")
        .value("dpd_action", "restart")
        .value("rekey_time", "1h")
        .value("policies", "no");
    Request::default()
        .list("local_addrs", &[&connection.local.to_string()])
        .list("remote_addrs", &[&connection.remote.to_string()])
        .list("proposals", &[IKE_PROPOSAL])
        .value("version", "2")
        // For ever.
        .value("keyingtries", "0")
        .value("encap", if config.udp_encap { "yes" } else { "no" })
        // When an address goes, charon would move its end of the tunnel to another one, of IPv6 for example, for which there are no
        // policies. Which addresses a tunnel has is said by leases.
        .value("mobike", "no")
        .section("local", psk())
        .section("remote", psk())
        .section("children", Request::default().section(&connection.child(), child))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::words::secret::Secret;

    /// The message as charon would read it.
    fn read(request: &Request) -> Section {
        let packet = request.command("");
        Section::parse(&packet[6..]).unwrap()
    }

    fn connection() -> Connection {
        Connection::parse("192.0.2.1-10.100.5.0/24-10.100.9.0/24-192.0.2.9").unwrap()
    }

    fn config(udp_encap: bool) -> IpsecConfig {
        let esp_proposal = IpsecConfig::ESP_PROPOSAL.to_owned();
        IpsecConfig { udp_encap, esp_proposal, psk: Secret::new("secret".into()) }
    }

    #[test]
    fn a_connection_has_upstreams_particulars() {
        let section = read(&particulars(&connection(), &config(false)));
        let list = |section: &Section, key: &str| section.lists[key].join(",");
        assert_eq!(list(&section, "local_addrs"), "192.0.2.1");
        assert_eq!(list(&section, "remote_addrs"), "192.0.2.9");
        assert_eq!(list(&section, "proposals"), "aes256-sha256-modp4096");
        let of = |section: &Section, keys: &[&str]| {
            keys.iter().map(|key| section.text(key).to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(of(&section, &["version", "keyingtries", "encap"]), ["2", "0", "no"]);
        assert_eq!(
            (section.sections["local"].text("auth"), section.sections["remote"].text("auth")),
            ("psk", "psk")
        );
        let child = &section.sections["children"].sections["10.100.5.0/24-10.100.9.0/24"];
        assert_eq!(list(child, "local_ts"), "10.100.5.0/24");
        assert_eq!(list(child, "remote_ts"), "10.100.9.0/24");
        assert_eq!(list(child, "esp_proposals"), "aes128gcm16-sha256-prfsha256-ecp256");
        assert_eq!(
            of(
                child,
                &["mode", "reqid", "start_action", "close_action", "dpd_action", "rekey_time", "policies"]
            ),
            ["tunnel", "11", "start", "trap", "restart", "1h", "no"]
        );
        assert_eq!(read(&particulars(&connection(), &config(true))).text("encap"), "yes");
    }

    #[test]
    fn a_key_belongs_to_both_ends() {
        let section = read(&key(&connection(), &config(false)));
        assert_eq!(section.text("id"), "flannel-192.0.2.1-10.100.5.0/24-10.100.9.0/24-192.0.2.9");
        assert_eq!((section.text("type"), section.text("data")), ("IKE", "secret"));
        assert_eq!(section.lists["owners"], ["192.0.2.1", "192.0.2.9"]);
    }

    #[test]
    fn how_far_a_tunnel_is() {
        let association = |state: &str, child: Option<&str>| {
            let mut section = Section::default();
            section.values.insert("state".into(), state.into());
            if let Some(child) = child {
                let mut inner = Section::default();
                inner.values.insert("state".into(), child.into());
                let children = Section { sections: [("a-1".into(), inner)].into(), ..Section::default() };
                section.sections.insert("child-sas".into(), children);
            }
            stage_of(&section)
        };
        assert_eq!(association("CONNECTING", None), Stage::Talking);
        assert_eq!(association("ESTABLISHED", None), Stage::Idle);
        assert_eq!(association("ESTABLISHED", Some("INSTALLED")), Stage::Up);
        assert_eq!(association("ESTABLISHED", Some("REKEYING")), Stage::Up);
        assert_eq!(association("DELETING", Some("DELETING")), Stage::Idle);
    }
}
