//! Eight runtimes' workers at once, at random: ADD, DEL, ADD that is killed, namespaces that vanish, GC. No address is ever had by two, and at
//! the end nothing is left. `FLANNEL_TESTS_LONG=1` walks 10,000 steps; `FLANNEL_TESTS_SEED` walks the same way again.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use std::{env, thread};

use anyhow::{Context, Result, bail, ensure};
use flannel_tests::in_lab;
use serde_json::{Value, json};

use crate::node::{Call, Node, answer, done, ip_of, one_host, with};
use crate::remains::{Remains, rich};

const WORKERS: usize = 8;
const STEPS: usize = 400;
const STEPS_LONG: usize = 10_000;
/// Namespaces each worker has to do with.
const CONTAINERS: usize = 3;

/// xorshift64*: the same seed walks the same way.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % sides
    }
}

/// Who has which address, by what the plugin said.
#[derive(Default)]
struct Had(Mutex<BTreeMap<String, String>>);

impl Had {
    fn take(&self, ip: &str, id: &str) -> Result<()> {
        let mut had = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match had.insert(ip.to_owned(), id.to_owned()) {
            Some(before) => bail!("{ip} was given to {id} while {before} had it"),
            None => Ok(()),
        }
    }

    /// Before the plugin is told: from then on somebody else may get it.
    fn leave(&self, id: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|_, owner| owner != id);
    }
}

/// One worker's containers: what it believes of each.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Believed {
    Absent,
    Attached,
    /// An ADD was killed, or the namespace vanished under it: DEL or GC must come.
    Broken,
}

struct Worker<'a> {
    node: &'a Node<'a>,
    had: &'a Had,
    number: usize,
    dice: Dice,
    containers: [Believed; CONTAINERS],
    counts: BTreeMap<&'static str, usize>,
}

impl Worker<'_> {
    fn id(&self, n: usize) -> String {
        format!("w{}c{n}", self.number)
    }

    /// Half of them with ports, each its own.
    fn conf(&self, n: usize) -> Value {
        let conf = with(&Node::conf(), "cniVersion", json!("1.1.0"));
        if n.is_multiple_of(2) {
            return conf;
        }
        let port =
            json!([{ "HostPort": 20000 + self.number * 10 + n, "ContainerPort": 80, "Protocol": "tcp" }]);
        with(&conf, "runtimeConfig", json!({ "portMappings": port }))
    }

    fn step(&mut self) -> Result<()> {
        let n = self.dice.roll(CONTAINERS);
        let (id, conf) = (self.id(n), self.conf(n));
        let what = match (self.containers[n], self.dice.roll(10)) {
            (Believed::Absent, 0..=5) => {
                let result = answer(&self.node.call(&Call::new("ADD", &id), &conf)?)?;
                self.had.take(&ip_of(&result), &id)?;
                self.containers[n] = Believed::Attached;
                "ADD"
            }
            (Believed::Absent, 6..=8) => {
                self.kill(&id, &conf)?;
                self.containers[n] = Believed::Broken;
                "ADD killed"
            }
            (Believed::Absent, _) => {
                done(&self.node.call(&Call::new("DEL", &id), &conf)?)?;
                "DEL of nothing"
            }
            (Believed::Attached, 0) => {
                self.node.host.sh(&format!("ip netns del {id}"))?;
                self.containers[n] = Believed::Broken;
                "namespace gone"
            }
            (Believed::Attached, 1..=3) => {
                self.node.ping(&id, "10.244.1.1").with_context(|| format!("{id} is cut off"))?;
                "ping"
            }
            (Believed::Broken, 0..=2) => {
                // It takes all that are broken.
                let broken = (0..CONTAINERS).filter(|n| self.containers[*n] == Believed::Broken);
                broken.for_each(|n| self.had.leave(&self.id(n)));
                self.collect()?;
                self.renew(n)?;
                "GC"
            }
            (Believed::Attached | Believed::Broken, roll) => {
                self.had.leave(&id);
                let netns = if roll.is_multiple_of(2) { String::new() } else { format!("/run/netns/{id}") };
                done(&self.node.call(&Call { netns, ..Call::new("DEL", &id) }, &conf)?)?;
                self.renew(n)?;
                "DEL"
            }
        };
        *self.counts.entry(what).or_default() += 1;
        Ok(())
    }

    /// Kills an ADD some time after its start.
    fn kill(&mut self, id: &str, conf: &Value) -> Result<()> {
        let after = self.dice.roll(9000);
        let script = format!("/run/kill.{}", self.number);
        let text = format!("#!/bin/sh\nexec timeout -s KILL 0.{after:06} flannel\n");
        self.node.host.write(&script, text)?;
        self.node.host.sh(&format!("chmod +x {script}"))?;
        self.node.call(&Call { plugin: &script, ..Call::new("ADD", id) }, conf).map(drop)
    }

    /// GC in the name of this worker alone: the others' containers are all valid. So are those of its own that live.
    fn collect(&self) -> Result<()> {
        let all = (0..WORKERS).flat_map(|worker| (0..CONTAINERS).map(move |n| (worker, n)));
        let valid: Vec<Value> = all
            .filter(|(worker, n)| *worker != self.number || self.containers[*n] == Believed::Attached)
            .map(|(worker, n)| json!({ "containerID": format!("w{worker}c{n}"), "ifname": "eth0" }))
            .collect();
        let conf = with(&self.conf(0), "cni.dev/valid-attachments", json!(valid));
        done(&self.node.call(&Call::new("GC", ""), &conf)?)
    }

    /// A new namespace for a container that is gone.
    fn renew(&mut self, n: usize) -> Result<()> {
        let id = self.id(n);
        self.node.host.sh(&format!("ip netns del {id} 2>/dev/null || true; ip netns add {id}"))?;
        self.containers[n] = Believed::Absent;
        Ok(())
    }
}

#[test]
fn nothing_is_had_twice_and_nothing_is_left() {
    let long = env::var_os("FLANNEL_TESTS_LONG").is_some_and(|long| long != "0");
    let seed = env::var("FLANNEL_TESTS_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| {
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(1, |now| now.as_nanos() as u64 | 1)
    });
    let steps = if long { STEPS_LONG } else { STEPS };
    eprintln!("FLANNEL_TESTS_SEED={seed}, {steps} steps");
    let life = Duration::from_secs(if long { 3600 } else { 600 });
    in_lab(one_host("cniwalk").needs(&["timeout"]).time_to_live(life), |lab| {
        let node = Node::new(lab.host(1))?;
        let before = Remains::before(&node)?;
        let had = Had::default();
        let start = Instant::now();
        let walk = |number: usize| -> Result<BTreeMap<&'static str, usize>> {
            let dice = Dice(seed.wrapping_mul(2 * number as u64 + 1) | 1);
            let (node, had) = (&node, &had);
            let mut worker = Worker {
                node,
                had,
                number,
                dice,
                containers: [Believed::Absent; CONTAINERS],
                counts: BTreeMap::new(),
            };
            (0..CONTAINERS).try_for_each(|n| worker.renew(n))?;
            for step in 0..steps / WORKERS {
                worker.step().with_context(|| format!("seed {seed}, worker {number}, step {step}"))?;
            }
            // Half of what is left is taken down, half is left to GC.
            for n in 0..CONTAINERS {
                let id = worker.id(n);
                had.leave(&id);
                if n.is_multiple_of(2) {
                    done(
                        &node
                            .call(&Call { netns: String::new(), ..Call::new("DEL", &id) }, &worker.conf(n))?,
                    )?;
                }
                node.host.sh(&format!("ip netns del {id} 2>/dev/null || true"))?;
            }
            Ok(worker.counts)
        };
        let counts: Vec<_> = thread::scope(|scope| {
            let workers: Vec<_> = (0..WORKERS)
                .map(|number| {
                    let walk = &walk;
                    scope.spawn(move || walk(number))
                })
                .collect();
            workers.into_iter().map(|worker| worker.join().expect("a worker panicked")).collect::<Result<_>>()
        })?;
        let mut all = BTreeMap::<&str, usize>::new();
        for (what, count) in counts.into_iter().flatten() {
            *all.entry(what).or_default() += count;
        }
        eprintln!("{all:?} in {:.0?}", start.elapsed());
        ensure!(["ADD", "ADD killed", "DEL", "GC"].iter().all(|what| all.contains_key(what)), "{all:?}");
        let conf = with(&rich(), "cni.dev/valid-attachments", json!([]));
        done(&node.call(&Call::new("GC", ""), &conf)?)?;
        before.are_none(&node, &format!("a walk with seed {seed}"))
    });
}

/// Middle of the times that calls took.
fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

#[test]
fn two_hundred_containers_cost_each_no_more_than_one() {
    const PRESENT: usize = 200;
    const MEASURED: usize = 15;
    in_lab(one_host("cnichurn").time_to_live(Duration::from_secs(600)), |lab| {
        let node = Node::new(lab.host(1))?;
        let host = lab.host(1);
        let conf = rich();
        let plain = with(&conf, "runtimeConfig", json!({}));
        let before = Remains::before(&node)?;
        host.sh("ip netns add m")?;
        let measure = |host: &flannel_tests::Host| -> Result<(Duration, Duration)> {
            let (mut adds, mut dels) = (Vec::new(), Vec::new());
            for _ in 0..MEASURED {
                for (verb, times) in [("ADD", &mut adds), ("DEL", &mut dels)] {
                    let start = Instant::now();
                    let output = node.call(&Call::new(verb, "m"), &plain)?;
                    times.push(start.elapsed());
                    ensure!(output.ok(), "{output} on {}", host.name());
                }
            }
            Ok((median(adds), median(dels)))
        };
        let alone = measure(host)?;
        let all = |verb: &str| -> Result<Duration> {
            let start = Instant::now();
            let each = |worker: usize| -> Result<()> {
                for n in (worker..PRESENT).step_by(WORKERS) {
                    let id = format!("p{n}");
                    if verb == "ADD" {
                        host.sh(&format!("ip netns add {id}"))?;
                    }
                    let output = node.call(&Call::new(verb, &id), &plain)?;
                    ensure!(output.ok(), "{output}");
                    if verb == "DEL" {
                        host.sh(&format!("ip netns del {id}"))?;
                    }
                }
                Ok(())
            };
            thread::scope(|scope| {
                let workers: Vec<_> = (0..WORKERS)
                    .map(|worker| {
                        let each = &each;
                        scope.spawn(move || each(worker))
                    })
                    .collect();
                workers.into_iter().try_for_each(|worker| worker.join().expect("a worker panicked"))
            })?;
            Ok(start.elapsed())
        };
        let came = all("ADD")?;
        ensure!(node.ledger()?.len() == PRESENT);
        let beside = measure(host)?;
        let went = all("DEL")?;
        eprintln!(
            "alone: ADD {:.1?} DEL {:.1?}; beside {PRESENT}: ADD {:.1?} DEL {:.1?}; {PRESENT}, {WORKERS} at once: ADD {:.0} a second, \
             DEL {:.0} a second (each with the start of its processes)",
            alone.0,
            alone.1,
            beside.0,
            beside.1,
            PRESENT as f64 / came.as_secs_f64(),
            PRESENT as f64 / went.as_secs_f64(),
        );
        for (what, alone, beside) in [("ADD", alone.0, beside.0), ("DEL", alone.1, beside.1)] {
            ensure!(
                beside < alone * 3 + Duration::from_millis(50),
                "{what}: {alone:?} alone, {beside:?} beside {PRESENT}"
            );
        }
        host.sh("ip netns del m")?;
        before.are_none(&node, "two hundred containers")
    });
}
