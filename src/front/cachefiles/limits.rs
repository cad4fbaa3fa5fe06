//! Culling limits: how much of the cache's file system may be filled, and in which order the kernel lets
//! them be set. Pure.

/// Limits on free space (`b...`) and free inodes (`f...`) of the cache's file system, in percent of the whole
/// of it. `None` leaves the kernel's own. They count once, at `bind` (fs/cachefiles/cache.c).
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct CullLimits {
    /// Above this much free space nothing needs to be culled.
    pub brun_percent: Option<u8>,
    /// Below this much free space objects should be culled.
    pub bcull_percent: Option<u8>,
    /// Below this much free space nothing more is written: every fill fails.
    pub bstop_percent: Option<u8>,
    /// Above this many free inodes nothing needs to be culled.
    pub frun_percent: Option<u8>,
    /// Below this many free inodes objects should be culled.
    pub fcull_percent: Option<u8>,
    /// Below this many free inodes no object is created.
    pub fstop_percent: Option<u8>,
}

/// What the kernel starts with: run, cull, stop (`cachefiles_daemon_open`).
const KERNEL_DEFAULTS: Percents = Percents { run: 7, cull: 5, stop: 1 };

/// Limits that no order of commands could set.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "{kind}stop {stop} %, {kind}cull {cull} %, {kind}run {run} % (kernel defaults included): they must grow in this order and stay below 100 %"
)]
pub struct BadLimits {
    kind: char,
    run: u8,
    cull: u8,
    stop: u8,
}

/// Three limits on one resource, in percent of the whole of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Percents {
    /// Above it nothing needs to be culled.
    pub run: u8,
    /// Below it objects should be culled.
    pub cull: u8,
    /// Below it nothing more is written or created.
    pub stop: u8,
}

impl Percents {
    const fn is_valid(self) -> bool {
        self.stop < self.cull && self.cull < self.run && self.run < 100
    }
}

impl CullLimits {
    /// The limits on free space, those of the kernel where none are set.
    #[must_use]
    pub fn blocks(&self) -> Percents {
        or_default(self.brun_percent, self.bcull_percent, self.bstop_percent)
    }

    /// The limits on free inodes, those of the kernel where none are set.
    #[must_use]
    pub fn files(&self) -> Percents {
        or_default(self.frun_percent, self.fcull_percent, self.fstop_percent)
    }

    /// These limits as a line of text, for whoever takes over a device that was bound with them.
    #[must_use]
    pub fn to_note(&self) -> String {
        let numbers = [self.blocks(), self.files()].map(|Percents { run, cull, stop }| format!("{run} {cull} {stop}"));
        format!("{}\n", numbers.join(" "))
    }

    /// The limits of such a line; `None` if it is none.
    #[must_use]
    pub fn from_note(line: &str) -> Option<Self> {
        let numbers: Result<Vec<u8>, _> = line.split_whitespace().map(str::parse).collect();
        let [brun, bcull, bstop, frun, fcull, fstop] = numbers.ok()?[..] else { return None };
        let limits = Self {
            brun_percent: Some(brun),
            bcull_percent: Some(bcull),
            bstop_percent: Some(bstop),
            frun_percent: Some(frun),
            fcull_percent: Some(fcull),
            fstop_percent: Some(fstop),
        };
        limits.commands().is_ok().then_some(limits)
    }

    /// The commands that set these limits, in an order in which the kernel accepts each.
    ///
    /// # Errors
    /// See [`BadLimits`].
    pub fn commands(&self) -> Result<Vec<String>, BadLimits> {
        let mut commands = order('b', self.blocks())?;
        commands.extend(order('f', self.files())?);
        Ok(commands)
    }
}

fn or_default(run: Option<u8>, cull: Option<u8>, stop: Option<u8>) -> Percents {
    let default = KERNEL_DEFAULTS;
    Percents { run: run.unwrap_or(default.run), cull: cull.unwrap_or(default.cull), stop: stop.unwrap_or(default.stop) }
}

/// Every command is checked against the current values of the other two, so the order depends on where they
/// move. Some command is always possible: if `run` would fall to the current `cull` or lower, `cull` falls too,
/// and if that would fall to the current `stop` or lower, `stop` falls too, which is possible at once.
fn order(kind: char, wanted: Percents) -> Result<Vec<String>, BadLimits> {
    let mut now = KERNEL_DEFAULTS;
    if !wanted.is_valid() {
        let Percents { run, cull, stop } = wanted;
        return Err(BadLimits { kind, run, cull, stop });
    }
    let mut commands = Vec::new();
    while now != wanted {
        let steps = [
            ("stop", wanted.stop, Percents { stop: wanted.stop, ..now }),
            ("cull", wanted.cull, Percents { cull: wanted.cull, ..now }),
            ("run", wanted.run, Percents { run: wanted.run, ..now }),
        ];
        let possible = steps.into_iter().find(|(_, _, then)| *then != now && then.is_valid());
        let Some((limit, percent, then)) = possible else {
            unreachable!("from {now:?} to {wanted:?} there is always a step");
        };
        commands.push(format!("{kind}{limit} {percent}%"));
        now = then;
    }
    Ok(commands)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The kernel's six handlers (fs/cachefiles/daemon.c) for one triple.
    fn obey(now: &mut Percents, command: &str) -> bool {
        let (verb, value) = command.split_once(' ').unwrap();
        let percent = value.strip_suffix('%').unwrap().parse().unwrap();
        let (slot, allowed) = match &verb[1..] {
            "run" => (&mut now.run, percent > now.cull && percent < 100),
            "cull" => (&mut now.cull, percent > now.stop && percent < now.run),
            "stop" => (&mut now.stop, percent < now.cull),
            other => panic!("no verb {other}"),
        };
        if allowed {
            *slot = percent;
        }
        allowed
    }

    proptest! {
        #[test]
        fn the_kernel_takes_every_command(
            wanted in proptest::collection::btree_set(0u8..100, 3),
            given in any::<[bool; 3]>(),
        ) {
            let mut sorted = wanted.into_iter();
            let (stop, cull, run) = (sorted.next(), sorted.next(), sorted.next());
            let limits = CullLimits {
                bstop_percent: stop.filter(|_| given[0]),
                bcull_percent: cull.filter(|_| given[1]),
                brun_percent: run.filter(|_| given[2]),
                ..CullLimits::default()
            };
            if let Ok(commands) = limits.commands() {
                let mut now = KERNEL_DEFAULTS;
                for command in &commands {
                    prop_assert!(obey(&mut now, command), "refused {} of {:?}", command, commands);
                }
                prop_assert_eq!(now.stop, limits.bstop_percent.unwrap_or(1));
                prop_assert_eq!(now.cull, limits.bcull_percent.unwrap_or(5));
                prop_assert_eq!(now.run, limits.brun_percent.unwrap_or(7));
            } else {
                prop_assert!(given != [true; 3], "valid limits were refused");
            }
        }
    }

    #[test]
    fn limits_that_contradict_a_default_are_explained() {
        let limits = CullLimits { fstop_percent: Some(6), ..CullLimits::default() };
        assert_eq!(
            limits.commands().unwrap_err().to_string(),
            "fstop 6 %, fcull 5 %, frun 7 % (kernel defaults included): they must grow in this order and stay below 100 %"
        );
        assert_eq!(CullLimits::default().commands(), Ok(vec![]));
    }
}
