//! Spans: who has which part of a run.

use smallvec::SmallVec;

use super::Runs;
use super::parts::{Run, Span};
use super::tables::Table;
use crate::WRITE;
use crate::sync::{AtomicU64, Ordering};

impl Runs {
    /// Tells of the words for spans of a run.
    #[inline(always)]
    pub(super) fn each_word<'a>(&'a self, run: &'a Run, tell: impl FnMut(&'a AtomicU64)) {
        let table = self.tables.get(run.table.load(Ordering::Relaxed));
        run.spans.iter().chain(table.into_iter().flat_map(Table::words)).for_each(tell);
    }

    /// Tells of the words that say which parts of a run a holder has.
    #[inline(always)]
    fn each_of<'a>(&'a self, run: &'a Run, tag: u16, mut tell: impl FnMut(&'a AtomicU64, Span)) {
        let table = self.tables.get(run.table.load(Ordering::Relaxed));
        let words = run.spans.iter().chain(table.into_iter().flat_map(|table| table.of(tag)));
        for word in words {
            if let Some(span) = Span::of(word.load(Ordering::Relaxed)).filter(|span| span.tag == tag) {
                tell(word, span);
            }
        }
    }

    /// The spans of a run, until `tell` says false.
    #[inline(always)]
    fn each_until(&self, run: &Run, mut tell: impl FnMut(Span) -> bool) {
        let table = self.tables.get(run.table.load(Ordering::Acquire));
        if let Some(table) = table {
            table.prefetch();
        }
        let in_run = run.spans.iter().filter_map(|word| Span::of(word.load(Ordering::Relaxed))).all(&mut tell);
        if let Some(table) = table.filter(|_| in_run) {
            table.each_some(|words| words.iter().filter_map(|word| Span::of(*word)).all(&mut tell));
        }
    }

    /// The spans of a run.
    #[inline(always)]
    pub(super) fn each_span(&self, run: &Run, mut tell: impl FnMut(Span)) {
        self.each_until(run, |span| {
            tell(span);
            true
        });
    }

    /// A word for one span more of a holder.
    fn vacant<'a>(&'a self, run: &'a Run, tag: u16) -> Option<&'a AtomicU64> {
        let in_run = run.spans.iter().find(|word| Span::of(word.load(Ordering::Relaxed)).is_none());
        let number = run.table.load(Ordering::Relaxed);
        let in_table = || self.tables.get(number)?.vacant(tag);
        in_run.or_else(in_table).or_else(|| self.make_table(run, number)?.vacant(tag))
    }

    /// A run gets another table, where what said nothing is not.
    #[cold]
    fn make_table(&self, run: &Run, number: u32) -> Option<Table<'_>> {
        let words = || self.tables.get(number).into_iter().flat_map(Table::words);
        let spans = || words().filter_map(|word| Span::of(word.load(Ordering::Relaxed)));
        let new = self.tables.take(spans().count() + 1, &self.budget)?;
        let table = self.tables.get(new)?;
        for span in spans() {
            table.vacant(span.tag)?.store(span.word(), Ordering::Relaxed);
        }
        run.change(|| run.table.store(new, WRITE));
        self.tables.give_back(number);
        Some(table)
    }

    /// A holder has a part of a run: how many of the blocks are new to it; `None` where there is no room to say so.
    pub(super) fn cover(&self, run: &Run, span: Span) -> Option<u32> {
        let (mut all, mut had, mut known) = (span, 0, SmallVec::<[&AtomicU64; 4]>::new());
        self.each_of(run, span.tag, |word, known_span| {
            if known_span.from <= span.to && known_span.to >= span.from {
                had += known_span.common(span.from, span.to);
                all.from = all.from.min(known_span.from);
                all.to = all.to.max(known_span.to);
                known.push(word);
            }
        });
        let added = span.to - span.from - had;
        match known.as_slice() {
            [] => self.vacant(run, span.tag)?.store(all.word(), WRITE),
            [one] => one.store(all.word(), WRITE),
            // A reader may not see a block of a holder twice.
            [first, rest @ ..] => run.change(|| {
                first.store(all.word(), WRITE);
                rest.iter().for_each(|word| word.store(Span::NONE, WRITE));
            }),
        }
        Some(added)
    }

    /// A holder does not have a part of a run any more: how many of these blocks it had. Where there is no room to say what is left behind the
    /// part, that is gone, too; `part.to` says so then.
    pub(super) fn uncover(&self, run: &Run, part: &mut Span) -> u32 {
        let (mut gone, mut behind) = (0, None);
        let Span { tag, from, to } = *part;
        self.each_of(run, tag, |word, known| {
            if known.common(from, to) == 0 {
                return;
            }
            gone += known.common(from, to);
            let left = Span { to: from.max(known.from), ..known };
            let right = Span { from: to.min(known.to), ..known };
            match (left.from < left.to, right.from < right.to) {
                (false, false) => word.store(Span::NONE, WRITE),
                (true, false) => word.store(left.word(), WRITE),
                (false, true) => word.store(right.word(), WRITE),
                (true, true) => {
                    word.store(left.word(), WRITE);
                    behind = Some(right);
                }
            }
        });
        if let Some(right) = behind {
            match self.vacant(run, tag) {
                Some(word) => word.store(right.word(), WRITE),
                None => {
                    gone += right.to - right.from;
                    part.to = right.to;
                }
            }
        }
        gone
    }

    /// The parts of a part of a run that nobody has.
    pub(super) fn each_gap(&self, run: &Run, from: u32, to: u32, mut tell: impl FnMut(u32, u32)) {
        let mut at = from;
        while at < to {
            // How far somebody has all from here; and where somebody begins.
            let (mut had, mut begins) = (at, to);
            self.each_until(run, |span| {
                if span.from <= at {
                    had = had.max(span.to);
                } else {
                    begins = begins.min(span.from);
                }
                had < to
            });
            if had == at {
                tell(at, begins);
                had = begins;
            }
            at = had;
        }
    }
}
