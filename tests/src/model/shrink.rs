//! Reduces a failing sequence to the part that is needed for the failure.

/// Returns the shortest sequence found that still fails, after at most `tries` calls of `fails`.
///
/// Removes shorter and shorter runs of elements, at the end single elements, if the remaining sequence still fails. The
/// complete `sequence` must fail.
pub fn shrink<T: Clone>(
    sequence: Vec<T>,
    tries: usize,
    mut fails: impl FnMut(&[T]) -> bool,
) -> Vec<T> {
    let mut shortest = sequence;
    let mut left = tries;
    let mut piece = shortest.len() / 2;
    while piece > 0 {
        let mut at = 0;
        while at < shortest.len() {
            if left == 0 {
                return shortest;
            }
            left -= 1;
            let end = (at + piece).min(shortest.len());
            let candidate: Vec<T> = [&shortest[..at], &shortest[end..]].concat();
            if fails(&candidate) {
                shortest = candidate;
            } else {
                at = end;
            }
        }
        piece = if piece == 1 { 0 } else { piece.div_ceil(2).min(piece - 1) };
    }
    shortest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_elements_needed_for_the_failure_remain() {
        let fails = |items: &[u32]| items.contains(&3) && items.contains(&77);
        assert_eq!(shrink((0..100).collect(), 10_000, fails), [3, 77]);
    }

    #[test]
    fn shrinking_stops_after_the_given_number_of_tries() {
        let mut tries = 0;
        let fails = |items: &[u32]| {
            tries += 1;
            items.contains(&3)
        };
        let left = shrink((0..100).collect(), 2, fails);
        assert!(left.contains(&3));
        assert_eq!(tries, 2);
    }
}
