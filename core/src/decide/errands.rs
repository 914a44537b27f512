//! Which of the operator's commands is run next: from what they should have been told and what they were told.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::words::extension::{Errand, Errands, ExtensionConfig, Occasion};

/// Which commands should have run.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Wanted {
    /// Nobody knows yet: what stands stays.
    #[default]
    Unknown,
    /// None: the network is carried otherwise, or leaves this host.
    Nothing,
    /// What comes before the lease.
    Prepared(ExtensionConfig),
    /// Everything.
    Served(Arc<Errands>),
}

impl Wanted {
    /// Whether the commands of this config are not wanted any more.
    pub fn overtakes(&self, config: &ExtensionConfig) -> bool {
        match self {
            Self::Unknown => false,
            Self::Nothing => true,
            Self::Prepared(wanted) => !same_commands(config, wanted),
            Self::Served(errands) => !same_commands(config, &errands.config),
        }
    }
}

/// A peer that commands were told of.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Told {
    /// What they were told.
    #[serde(flatten)]
    pub errand: Errand,
    /// Whether `SubnetAddCommand` ended well since the last start. If not it may have begun, so it is run again, and what it
    /// did is to be removed all the same.
    pub done: bool,
}

/// What commands were told: what a restart must know of.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Standing {
    /// The commands; none if nothing stands.
    pub config: Option<ExtensionConfig>,
    /// Our own values, as far as `PostStartupCommand` was told.
    pub own: Errand,
    /// The peers, by the key of their lease.
    pub peers: BTreeMap<String, Told>,
    /// What `PreStartupCommand` of this start printed.
    #[serde(skip)]
    pub prepared: Option<Option<String>>,
    /// Whether `PostStartupCommand` of this start ended well.
    #[serde(skip)]
    pub started: bool,
}

/// Something to do: a command to run, if there is one, and whom it is about.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Step {
    /// Which command.
    pub occasion: Occasion,
    /// Key of the peer's lease, for those about peers.
    pub peer: Option<String>,
}

impl Step {
    /// About no peer.
    pub const fn of(occasion: Occasion) -> Self {
        Self { occasion, peer: None }
    }

    fn about(occasion: Occasion, peer: &str) -> Self {
        Self { occasion, peer: Some(peer.to_owned()) }
    }
}

/// The next step; none if nothing is left but what is in `failed` and what has to wait for that.
pub fn next(standing: &Standing, wanted: &Wanted, failed: &BTreeSet<Step>) -> Option<Step> {
    let config = match wanted {
        Wanted::Unknown => return None,
        Wanted::Nothing => None,
        Wanted::Prepared(config) => Some(config),
        Wanted::Served(errands) => Some(&errands.config),
    };
    let open = |step: Step| (!failed.contains(&step)).then_some(step);
    if let Some(stands) = &standing.config
        && config.is_none_or(|config| !same_commands(stands, config))
    {
        let remove = |peer: &String| open(Step::about(Occasion::SubnetRemove, peer));
        return match standing.peers.is_empty() {
            false => standing.peers.keys().find_map(remove),
            true => open(Step::of(Occasion::Shutdown)),
        };
    }
    config?;
    if standing.prepared.is_none() {
        return open(Step::of(Occasion::PreStartup));
    }
    let Wanted::Served(errands) = wanted else { return None };
    if !standing.started || standing.own != errands.own {
        return open(Step::of(Occasion::PostStartup));
    }
    // Before anything is added: a subnet may have another holder now.
    let gone = standing.peers.iter().filter(|(peer, told)| errands.peers.get(*peer) != Some(&told.errand));
    let remove = gone.map(|(peer, _)| peer).find_map(|peer| open(Step::about(Occasion::SubnetRemove, peer)));
    let add = |peer: &String| match standing.peers.get(peer) {
        Some(told) if told.done || errands.peers.get(peer) != Some(&told.errand) => None,
        _ => open(Step::about(Occasion::SubnetAdd, peer)),
    };
    remove.or_else(|| errands.peers.keys().find_map(add))
}

/// Whether what one config's commands made is another's. More time changes nothing.
fn same_commands(one: &ExtensionConfig, other: &ExtensionConfig) -> bool {
    ExtensionConfig { timeout: None, ..one.clone() } == ExtensionConfig { timeout: None, ..other.clone() }
}

impl Standing {
    /// Puts down, before the first command runs, whose commands they are.
    pub fn adopt(&mut self, wanted: &Wanted) {
        let config = match wanted {
            Wanted::Unknown | Wanted::Nothing => return,
            Wanted::Prepared(config) => config,
            Wanted::Served(errands) => &errands.config,
        };
        if self.config.as_ref().is_none_or(|stands| same_commands(stands, config)) {
            self.config = Some(config.clone());
        }
    }

    /// What the command of a step is told.
    pub fn errand(&self, wanted: &Wanted, step: &Step) -> Errand {
        let Wanted::Served(errands) = wanted else { return self.told(step) };
        match (step.occasion, &step.peer) {
            (Occasion::PostStartup, _) => errands.own.clone(),
            (Occasion::SubnetAdd, Some(peer)) => errands.peers.get(peer).cloned().unwrap_or_default(),
            _ => self.told(step),
        }
    }

    fn told(&self, step: &Step) -> Errand {
        match (step.occasion, &step.peer) {
            (Occasion::SubnetRemove, Some(peer)) => {
                self.peers.get(peer).map(|told| told.errand.clone()).unwrap_or_default()
            }
            (Occasion::Shutdown, _) => self.own.clone(),
            _ => Errand::default(),
        }
    }

    /// Puts down that a step begins: from here on there may be something to remove.
    pub fn begin(&mut self, step: &Step, errand: &Errand) {
        if let (Occasion::SubnetAdd, Some(peer)) = (step.occasion, &step.peer) {
            self.peers.insert(peer.clone(), Told { errand: errand.clone(), done: false });
        }
    }

    /// Puts down that a step ended well, and what its command printed if there was one. What comes at a start may begin from
    /// nothing, as upstream's examples do by making their device anew: the peers are told again after it.
    pub fn end(&mut self, step: &Step, errand: Errand, printed: Option<String>) {
        let again =
            matches!(step.occasion, Occasion::PreStartup | Occasion::PostStartup) && printed.is_some();
        if again {
            self.peers.values_mut().for_each(|told| told.done = false);
        }
        match (step.occasion, &step.peer) {
            (Occasion::PreStartup, _) => self.prepared = Some(printed),
            (Occasion::PostStartup, _) => {
                self.own = errand;
                self.started = true;
            }
            (Occasion::Shutdown, _) => *self = Self::default(),
            (Occasion::SubnetAdd, Some(peer)) => {
                self.peers.insert(peer.clone(), Told { errand, done: true });
            }
            (Occasion::SubnetRemove, Some(peer)) => {
                self.peers.remove(peer);
            }
            (Occasion::SubnetAdd | Occasion::SubnetRemove, None) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::words::extension::CommandLine;

    fn config(with_startup: bool) -> ExtensionConfig {
        let command = |text: &str| Some(CommandLine::Shell(text.to_owned()));
        ExtensionConfig {
            post_startup: command("post").filter(|_| with_startup),
            subnet_add: command("add"),
            subnet_remove: command("remove"),
            ..ExtensionConfig::default()
        }
    }

    fn errand(input: &str) -> Errand {
        Errand { input: input.to_owned(), ..Errand::default() }
    }

    fn served(config: ExtensionConfig, peers: &[(&str, &str)]) -> Wanted {
        let peers = peers.iter().map(|(peer, input)| ((*peer).to_owned(), errand(input))).collect();
        Wanted::Served(Arc::new(Errands { config, own: errand("own"), peers }))
    }

    /// Does everything that is to be done, and says in which order; what `fails` never ends well.
    fn work(standing: &mut Standing, wanted: &Wanted, fails: &str) -> String {
        let mut failed = BTreeSet::new();
        let mut did = Vec::new();
        for _ in 0..100 {
            standing.adopt(wanted);
            let Some(step) = next(standing, wanted, &failed) else { return did.join(" ") };
            let told = standing.errand(wanted, &step);
            let letter = match step.occasion {
                Occasion::PreStartup => "pre",
                Occasion::PostStartup => "post",
                Occasion::Shutdown => "shutdown",
                Occasion::SubnetAdd => "+",
                Occasion::SubnetRemove => "-",
            };
            let text = format!("{letter}{}{}", step.peer.as_deref().unwrap_or_default(), told.input);
            standing.begin(&step, &told);
            if text == fails {
                failed.insert(step);
            } else {
                let ran =
                    standing.config.as_ref().is_some_and(|config| config.command(step.occasion).is_some());
                standing.end(&step, told, ran.then(String::new));
            }
            did.push(text);
        }
        panic!("no end: {did:?}")
    }

    /// A restart of the program in the same boot.
    fn restarted(standing: &Standing) -> Standing {
        serde_json::from_str(&serde_json::to_string(standing).unwrap()).unwrap()
    }

    #[test]
    fn only_the_difference_is_told() {
        let mut standing = Standing::default();
        assert_eq!(work(&mut standing, &Wanted::Unknown, ""), "");
        assert_eq!(work(&mut standing, &Wanted::Prepared(config(false)), ""), "pre");
        assert_eq!(
            work(&mut standing, &served(config(false), &[("a", "1"), ("b", "2")]), ""),
            "postown +a1 +b2"
        );
        assert_eq!(work(&mut standing, &served(config(false), &[("a", "1"), ("b", "2")]), ""), "");
        // Another value is gone and come, and what goes goes first.
        assert_eq!(
            work(&mut standing, &served(config(false), &[("b", "3"), ("c", "4")]), ""),
            "-a1 -b2 +b3 +c4"
        );
        let more_time = ExtensionConfig { timeout: Some(3), ..config(false) };
        assert_eq!(work(&mut standing, &served(more_time, &[("b", "3"), ("c", "4")]), ""), "");
        assert_eq!(work(&mut standing, &Wanted::Nothing, ""), "-b3 -c4 shutdownown");
        assert_eq!(standing, Standing::default());
    }

    #[test]
    fn a_restart_adds_nothing_twice_unless_it_began_from_nothing() {
        let mut standing = Standing::default();
        work(&mut standing, &served(config(false), &[("a", "1"), ("b", "2")]), "");
        let later = served(config(false), &[("b", "2"), ("c", "3")]);
        assert_eq!(work(&mut restarted(&standing), &later, ""), "pre postown -a1 +c3");

        let mut standing = Standing::default();
        work(&mut standing, &served(config(true), &[("a", "1"), ("b", "2")]), "");
        let later = served(config(true), &[("b", "2"), ("c", "3")]);
        assert_eq!(work(&mut restarted(&standing), &later, ""), "pre postown -a1 +b2 +c3");
    }

    #[test]
    fn what_fails_holds_up_only_what_needs_it() {
        let mut standing = Standing::default();
        let wanted = served(config(false), &[("a", "1"), ("b", "2")]);
        assert_eq!(work(&mut standing, &wanted, "pre"), "pre");
        assert_eq!(work(&mut standing, &wanted, "postown"), "pre postown");
        assert_eq!(work(&mut standing, &wanted, "+a1"), "postown +a1 +b2");
        // It may have done something.
        assert_eq!(work(&mut standing, &served(config(false), &[("b", "2")]), ""), "-a1");
        assert_eq!(work(&mut standing, &served(config(false), &[("b", "3")]), "-b2"), "-b2");
        assert_eq!(work(&mut standing, &Wanted::Nothing, "-b2"), "-b2");
    }

    #[test]
    fn other_commands_begin_when_what_the_old_ones_made_is_gone() {
        let mut standing = Standing::default();
        work(&mut standing, &served(config(false), &[("a", "1")]), "");
        let mut standing = restarted(&standing);
        assert_eq!(
            work(&mut standing, &served(config(true), &[("a", "1")]), ""),
            "-a1 shutdownown pre postown +a1"
        );
        assert_eq!(standing.config, Some(config(true)));
    }
}
