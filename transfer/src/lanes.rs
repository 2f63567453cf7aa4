//! Lanes: bounded queues of transfers, the most urgent served first. Pure; the volume that serves them
//! brings the lock.

use std::collections::VecDeque;

/// Which queue a transfer waits in, least urgent first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Lane {
    /// Background: copies to a lower tier, verification.
    Background,
    /// Ahead of need.
    Prefetch,
    /// Somebody waits.
    Demand,
}

/// All lanes, most urgent first.
pub const LANES: [Lane; 3] = [Lane::Demand, Lane::Prefetch, Lane::Background];

/// After this many transfers in a row out of faster lanes, one of the slowest that waits goes: reads that
/// never end must not keep dirty blocks in memory for ever.
const PASSED_OVER_MAX: u32 = 16;

/// Transfers that wait in each lane at most.
#[derive(Clone, Copy, Debug)]
pub struct LaneCaps {
    /// Demand.
    pub demand: usize,
    /// Prefetch.
    pub prefetch: usize,
    /// Background.
    pub background: usize,
}

/// Three bounded queues.
#[derive(Debug)]
pub struct Lanes<T> {
    queues: [VecDeque<T>; 3],
    caps: LaneCaps,
    passed_over: u32,
}

impl<T> Lanes<T> {
    /// Empty lanes.
    pub fn new(caps: LaneCaps) -> Self {
        Self { queues: [VecDeque::new(), VecDeque::new(), VecDeque::new()], caps, passed_over: 0 }
    }

    /// Queues a transfer; hands it back where its lane is full.
    pub fn push(&mut self, lane: Lane, transfer: T) -> Result<(), T> {
        let cap = match lane {
            Lane::Demand => self.caps.demand,
            Lane::Prefetch => self.caps.prefetch,
            Lane::Background => self.caps.background,
        };
        let queue = self.queue(lane);
        if queue.len() >= cap {
            return Err(transfer);
        }
        queue.push_back(transfer);
        Ok(())
    }

    /// The transfer that goes next, of lanes that `may` name.
    pub fn pop(&mut self, may: impl Fn(Lane) -> bool) -> Option<(Lane, T)> {
        let overdue = self.passed_over >= PASSED_OVER_MAX;
        if overdue && may(Lane::Background) && !self.queue(Lane::Background).is_empty() {
            self.passed_over = 0;
            return self.queue(Lane::Background).pop_front().map(|transfer| (Lane::Background, transfer));
        }
        let lane = LANES.into_iter().find(|lane| may(*lane) && !self.queue(*lane).is_empty())?;
        let waits = lane != Lane::Background && !self.queue(Lane::Background).is_empty();
        self.passed_over = if waits { self.passed_over + 1 } else { 0 };
        self.queue(lane).pop_front().map(|transfer| (lane, transfer))
    }

    /// Everything that waits, most urgent first.
    pub fn drain(&mut self) -> impl Iterator<Item = T> + '_ {
        std::iter::from_fn(|| self.pop(|_| true)).map(|(_, transfer)| transfer)
    }

    /// Moves the first waiting transfer that `is_it` to a faster lane; nothing where it is not waiting any
    /// more, waits there already, or the lane is full.
    pub fn raise(&mut self, to: Lane, is_it: impl Fn(&T) -> bool) {
        for lane in LANES.into_iter().filter(|lane| *lane < to) {
            if let Some(at) = self.queue(lane).iter().position(&is_it)
                && let Some(transfer) = self.queue(lane).remove(at)
                && let Err(transfer) = self.push(to, transfer)
            {
                self.queue(lane).push_front(transfer);
            }
        }
    }

    /// Transfers that wait in a lane.
    pub fn len(&self, lane: Lane) -> usize {
        let [background, prefetch, demand] = &self.queues;
        match lane {
            Lane::Demand => demand.len(),
            Lane::Prefetch => prefetch.len(),
            Lane::Background => background.len(),
        }
    }

    /// True when nothing waits.
    pub fn is_empty(&self) -> bool {
        self.queues.iter().all(VecDeque::is_empty)
    }

    fn queue(&mut self, lane: Lane) -> &mut VecDeque<T> {
        let [background, prefetch, demand] = &mut self.queues;
        match lane {
            Lane::Demand => demand,
            Lane::Prefetch => prefetch,
            Lane::Background => background,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAPS: LaneCaps = LaneCaps { demand: 100, prefetch: 2, background: 100 };

    #[test]
    fn the_most_urgent_goes_first_and_full_lanes_refuse() {
        let mut lanes = Lanes::new(CAPS);
        for (lane, name) in
            [(Lane::Background, "w"), (Lane::Prefetch, "p1"), (Lane::Demand, "d"), (Lane::Prefetch, "p2")]
        {
            lanes.push(lane, name).unwrap();
        }
        assert_eq!(lanes.push(Lane::Prefetch, "p3"), Err("p3"));
        lanes.raise(Lane::Demand, |name| *name == "p2");
        let order: Vec<&str> = std::iter::from_fn(|| lanes.pop(|_| true)).map(|(_, name)| name).collect();
        assert_eq!(order, ["d", "p2", "p1", "w"]);
        assert!(lanes.is_empty());
    }

    #[test]
    fn endless_reads_do_not_starve_writes() {
        let mut lanes = Lanes::new(CAPS);
        lanes.push(Lane::Background, 0).unwrap();
        let mut before = 0;
        loop {
            lanes.push(Lane::Demand, 1).unwrap();
            match lanes.pop(|_| true).unwrap() {
                (Lane::Background, _) => break,
                _ => before += 1,
            }
            assert!(before < 100);
        }
        lanes.push(Lane::Background, 0).unwrap();
        while lanes.pop(|lane| lane == Lane::Demand).is_some() {}
        assert_eq!(lanes.len(Lane::Background), 1, "a lane that may not be served keeps what it has");
    }
}
