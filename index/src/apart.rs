//! What the writer changes with every event, on lines of its own: whoever reads what would lie beside it would wait for the line each time.

/// See the head of this file. Two lines: processors bring them in pairs.
#[repr(align(128))]
pub struct Apart<T>(pub T);

impl<T> std::ops::Deref for Apart<T> {
    type Target = T;

    #[inline(always)]
    fn deref(&self) -> &T {
        &self.0
    }
}
