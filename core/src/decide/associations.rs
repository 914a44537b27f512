//! What charon must be told so that it holds what it should. It is asked first what it has: nothing is remembered but what it
//! does not say.

use std::collections::{BTreeMap, BTreeSet};

use crate::words::addr::Prefix;
use crate::words::ipsec::{Associations, Connection};

/// What charon has of ours, by the names that it gives.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Held {
    /// Keys.
    pub keys: BTreeSet<Connection>,
    /// Connections.
    pub connections: BTreeSet<Connection>,
    /// Associations with peers, and how far they are.
    pub tunnels: BTreeMap<Connection, Stage>,
}

/// How far an association with a peer is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Stage {
    /// There is one, and it carries nothing.
    Idle,
    /// The two talk.
    Talking,
    /// It carries packets.
    Up,
}

/// One thing to tell charon.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Step {
    /// Forget a connection.
    Unload(Connection),
    /// End what it has with a peer.
    Terminate(Connection),
    /// Forget a key.
    UnloadKey(Connection),
    /// Take a key.
    LoadKey(Connection),
    /// Take a connection, and begin it if it is new.
    Load(Connection),
    /// Begin a connection that it has already.
    Initiate(Connection),
}

/// What is to be told, in this order. Names that are ours but of another network than these are not touched. Of what is in `told`
/// charon has been told the particulars since it runs and since they changed; it does not say them itself.
pub fn steps(
    wanted: Option<&Associations>,
    networks: &BTreeSet<Prefix>,
    held: &Held,
    told: &BTreeSet<Connection>,
) -> Vec<Step> {
    let wanted: BTreeSet<Connection> = wanted.iter().flat_map(|wanted| wanted.connections()).collect();
    let ours = |connection: &&Connection| {
        let inside = |cidr: &Prefix| cidr.covers(&connection.own) && cidr.covers(&connection.subnet);
        networks.iter().any(inside) && !wanted.contains(connection)
    };
    let mut steps = Vec::new();
    steps.extend(held.connections.iter().filter(ours).copied().map(Step::Unload));
    steps.extend(held.tunnels.keys().filter(ours).copied().map(Step::Terminate));
    steps.extend(held.keys.iter().filter(ours).copied().map(Step::UnloadKey));
    for connection in &wanted {
        let known = told.contains(connection);
        if !known || !held.keys.contains(connection) {
            steps.push(Step::LoadKey(*connection));
        }
        if !known || !held.connections.contains(connection) {
            steps.push(Step::Load(*connection));
        } else if held.tunnels.get(connection).is_none_or(|stage| *stage == Stage::Idle) {
            steps.push(Step::Initiate(*connection));
        }
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::words::ipsec::IpsecConfig;
    use crate::words::secret::Secret;

    fn wanted(peers: &[u8]) -> Associations {
        Associations {
            config: IpsecConfig {
                udp_encap: false,
                esp_proposal: IpsecConfig::ESP_PROPOSAL.into(),
                psk: Secret::new("secret".into()),
            },
            local: [192, 0, 2, 1].into(),
            own: "10.100.1.0/24".parse().unwrap(),
            peers: peers
                .iter()
                .map(|n| (format!("10.100.{n}.0/24").parse().unwrap(), [192, 0, 2, *n].into()))
                .collect(),
        }
    }

    fn to(peer: u8) -> Connection {
        wanted(&[peer]).connections().next().unwrap()
    }

    fn networks() -> BTreeSet<Prefix> {
        BTreeSet::from(["10.100.0.0/16".parse().unwrap()])
    }

    #[test]
    fn an_empty_charon_is_told_everything_and_a_full_one_nothing() {
        let two = wanted(&[2, 3]);
        let none = BTreeSet::new();
        assert_eq!(
            steps(Some(&two), &networks(), &Held::default(), &none),
            [Step::LoadKey(to(2)), Step::Load(to(2)), Step::LoadKey(to(3)), Step::Load(to(3))]
        );
        let all = BTreeSet::from([to(2), to(3)]);
        let mut held = Held {
            keys: all.clone(),
            connections: all.clone(),
            tunnels: [(to(2), Stage::Up), (to(3), Stage::Talking)].into(),
        };
        assert_eq!(steps(Some(&two), &networks(), &held, &all), []);
        held.tunnels.insert(to(2), Stage::Idle);
        held.tunnels.remove(&to(3));
        assert_eq!(
            steps(Some(&two), &networks(), &held, &all),
            [Step::Initiate(to(2)), Step::Initiate(to(3))]
        );
        // Somebody unloaded one; and of another it is not known with what it was loaded.
        held.connections.remove(&to(2));
        assert_eq!(
            steps(Some(&two), &networks(), &held, &BTreeSet::from([to(2)])),
            [Step::Load(to(2)), Step::LoadKey(to(3)), Step::Load(to(3))]
        );
    }

    #[test]
    fn what_left_while_nobody_looked_is_taken_away_and_nothing_else() {
        let mut elsewhere = to(4);
        elsewhere.subnet = "10.99.4.0/24".parse().unwrap();
        let all = BTreeSet::from([to(2), to(9), elsewhere]);
        let held = Held {
            keys: all.clone(),
            connections: all.clone(),
            tunnels: [(to(2), Stage::Up), (to(9), Stage::Up), (elsewhere, Stage::Up)].into(),
        };
        let one = wanted(&[2]);
        let gone = [Step::Unload(to(9)), Step::Terminate(to(9)), Step::UnloadKey(to(9))];
        assert_eq!(steps(Some(&one), &networks(), &held, &all), gone);
        let left = steps(None, &networks(), &held, &BTreeSet::new());
        assert_eq!(left.len(), 6);
        assert!(!left.contains(&Step::Unload(elsewhere)));
        assert_eq!(steps(None, &BTreeSet::new(), &held, &all), []);
    }
}
