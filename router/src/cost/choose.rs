//! Which worker gets a request.

use super::Terms;

/// Workers are equals within this part of the best's time, or within so many seconds.
const NEARLY: f64 = 1.05;
const NEARLY_SECONDS: f64 = 0.002;

/// How to choose.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Choose {
    /// 0: the one that is expected to answer first. Above: the others, too, the more often the nearer they come to it; at 1, one that is
    /// expected to take twice as long gets a request for nearly three of the best.
    pub temperature: f64,
    /// Workers with so many requests under way get no more.
    pub requests_max: u64,
    /// Nor do those that are expected to take so many seconds to the first token.
    pub seconds_max: f64,
    /// A session stays with the worker that it was at, while that is expected to take at most so many times the best's time.
    pub affinity: f64,
}

impl Default for Choose {
    fn default() -> Self {
        Self { temperature: 0.0, requests_max: 256, seconds_max: 60.0, affinity: 1.25 }
    }
}

/// A choice.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Choice {
    /// Which of the candidates.
    pub at: usize,
    /// What decided.
    pub why: Why,
    /// How many are nearly as good as the best, with it.
    pub equals: usize,
}

/// What decided a choice.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Why {
    /// It is expected to answer first, or is one of several equals, whose turn it is.
    Best,
    /// The session was there before. `costlier`: another is expected to answer sooner.
    Session {
        /// ...
        costlier: bool,
    },
    /// Chance, by the temperature.
    Chance,
}

/// Every worker has as much as it may.
#[derive(Clone, Copy, PartialEq, Debug, thiserror::Error)]
#[error("every worker is full; the first is expected to be free in {retry_seconds:.1} s")]
pub struct Overload {
    /// When to try again, in seconds.
    pub retry_seconds: f64,
}

/// Chooses among candidates: of each its terms, its requests under way, and whether the session was there before. `chance` is between 0 and 1.
/// `None` where there are none.
pub fn choose(how: &Choose, candidates: &[(Terms, u64, bool)], chance: f64) -> Option<Result<Choice, Overload>> {
    if candidates.is_empty() {
        return None;
    }
    let may = |(terms, requests, _): &(Terms, u64, bool)| {
        *requests < how.requests_max && terms.queue_seconds + terms.fetch_seconds <= how.seconds_max
    };
    let open: Vec<usize> = (0..).zip(candidates).filter(|(_, candidate)| may(candidate)).map(|(at, _)| at).collect();
    let expected = |at: usize| candidates.get(at).map_or(f64::MAX, |(terms, _, _)| terms.expected());
    let requests = |at: usize| candidates.get(at).map_or(u64::MAX, |(_, requests, _)| *requests);
    let soonest = open.iter().copied().min_by(|a, b| expected(*a).total_cmp(&expected(*b)));
    let Some(soonest) = soonest else {
        let free =
            candidates.iter().map(|(terms, _, _)| terms.queue_seconds - how.seconds_max).fold(f64::MAX, f64::min);
        return Some(Err(Overload { retry_seconds: free.clamp(1.0, 60.0) }));
    };
    // Nobody can tell workers apart that have as much of the prompt, and a speed that was learnt from other requests: those nearly as
    // good are equals. Of them, the one with fewer requests; of those, whose turn it is.
    let cached =
        |at: usize| candidates.get(at).map(|(terms, _, _)| (terms.cached.engine_tokens, terms.cached.tokens()));
    let limit = (expected(soonest) * NEARLY).max(expected(soonest) + NEARLY_SECONDS);
    let near: Vec<usize> =
        open.iter().copied().filter(|at| expected(*at) <= limit && cached(*at) == cached(soonest)).collect();
    let fewest = near.iter().map(|at| requests(*at)).min().unwrap_or_default();
    let equals: Vec<usize> = near.into_iter().filter(|at| requests(*at) == fewest).collect();
    let turn = (chance * equals.len() as f64) as usize;
    let best = equals.get(turn).copied().unwrap_or(soonest);
    let equals = equals.len();
    let stays = |at: &&usize| {
        candidates.get(**at).is_some_and(|(_, _, session)| *session) && expected(**at) <= expected(best) * how.affinity
    };
    if let Some(at) = open.iter().find(stays) {
        let costlier = expected(*at) > expected(best);
        return Some(Ok(Choice { at: *at, why: Why::Session { costlier }, equals }));
    }
    if how.temperature > 0.0 {
        let at = sample(&open, &expected, expected(best), how.temperature, chance);
        return Some(Ok(Choice { at, why: Why::Chance, equals }));
    }
    Some(Ok(Choice { at: best, why: Why::Best, equals }))
}

/// Softmax of how much longer than the best each takes, in units of the best's time.
fn sample(open: &[usize], expected: &impl Fn(usize) -> f64, best: f64, temperature: f64, chance: f64) -> usize {
    let weight = |at: usize| (-(expected(at) - best) / best.max(1e-3) / temperature).exp();
    let total: f64 = open.iter().map(|at| weight(*at)).sum();
    let mut left = chance * total;
    for at in open {
        left -= weight(*at);
        if left <= 0.0 {
            return *at;
        }
    }
    open.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(queue: f64, requests: u64, session: bool) -> (Terms, u64, bool) {
        (Terms { queue_seconds: queue, prefill_seconds: 0.1, ..Terms::default() }, requests, session)
    }

    fn chosen(how: &Choose, candidates: &[(Terms, u64, bool)], chance: f64) -> usize {
        choose(how, candidates, chance).unwrap().unwrap().at
    }

    #[test]
    fn the_first_to_answer_is_chosen() {
        let how = Choose::default();
        assert_eq!(choose(&how, &[], 0.5), None);
        assert_eq!(
            chosen(&how, &[candidate(0.3, 1, false), candidate(0.1, 9, false), candidate(0.2, 0, false)], 0.9),
            1
        );
        // Equals take turns by chance, the emptier one first.
        let equal = [candidate(0.1, 2, false), candidate(0.1, 2, false)];
        assert_eq!((chosen(&how, &equal, 0.0), chosen(&how, &equal, 0.99)), (0, 1));
        assert_eq!(chosen(&how, &[candidate(0.1, 2, false), candidate(0.1, 1, false)], 0.0), 1);
        // A speed that was learnt is not so exact that one of them should have all requests.
        assert_eq!(chosen(&how, &[candidate(0.1, 2, false), candidate(0.105, 1, false)], 0.0), 1);
        assert_eq!(chosen(&how, &[candidate(0.1, 2, false), candidate(0.13, 1, false)], 0.0), 0);
        let mut cached = candidate(0.1, 2, false);
        cached.0.cached.engine_tokens = 64;
        assert_eq!(chosen(&how, &[cached, candidate(0.101, 1, false)], 0.0), 0, "it has some of the prompt");
        // What is in an engine is better than what can be fetched, however soon that is.
        let mut fetched = candidate(0.1001, 1, false);
        fetched.0.cached.fetched_tokens = 64;
        assert_eq!(chosen(&how, &[cached, fetched], 0.0), 0);
    }

    #[test]
    fn a_session_stays_while_that_costs_little() {
        let how = Choose::default();
        let near = [candidate(0.1, 0, false), candidate(0.13, 0, true)];
        assert_eq!(
            choose(&how, &near, 0.0),
            Some(Ok(Choice { at: 1, why: Why::Session { costlier: true }, equals: 1 }))
        );
        assert_eq!(chosen(&how, &[candidate(0.1, 0, false), candidate(0.3, 0, true)], 0.0), 0);
    }

    #[test]
    fn who_is_full_gets_nothing_and_all_full_is_overload() {
        let how = Choose { requests_max: 4, seconds_max: 2.0, ..Choose::default() };
        assert_eq!(chosen(&how, &[candidate(0.0, 4, true), candidate(1.0, 3, false)], 0.0), 1);
        let full = choose(&how, &[candidate(0.0, 4, false), candidate(9.0, 0, false)], 0.0).unwrap();
        assert_eq!(full, Err(Overload { retry_seconds: 1.0 }));
        let later = choose(&how, &[candidate(9.0, 0, false)], 0.0).unwrap();
        assert_eq!(later, Err(Overload { retry_seconds: 7.0 }));
    }

    #[test]
    fn warmth_spreads_and_prefers_the_better() {
        let how = Choose { temperature: 1.0, ..Choose::default() };
        let candidates = [candidate(0.1, 0, false), candidate(0.3, 0, false), candidate(50.0, 0, false)];
        let mut counts = [0; 3];
        (0..1000).for_each(|step| counts[chosen(&how, &candidates, f64::from(step) / 1000.0)] += 1);
        assert!(counts[0] > 650 && counts[1] > 200 && counts[2] == 0, "{counts:?}");
    }
}
