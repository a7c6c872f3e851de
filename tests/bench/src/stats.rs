//! Medians, and how results are printed.

use serde_json::Value;

/// The median; of an even number of values, the mean of the middle two. `None` without values.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        n if n % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

/// Median of `field` over the runs of one side.
pub(crate) fn median_of(runs: &[Value], side: &str, field: &str) -> Option<f64> {
    median(runs.iter().filter_map(|run| run[side][field].as_f64()))
}

/// Three significant decimals are more than the noise allows.
pub(crate) fn rounded(value: Option<f64>) -> Value {
    value.map_or(Value::Null, |value| {
        Value::from((value * 1000.0).round() / 1000.0)
    })
}

/// `a / b`, where both are known.
pub(crate) fn ratio(a: Option<f64>, b: Option<f64>) -> Option<f64> {
    match (a, b) {
        (Some(a), Some(b)) if b > 0.0 => Some(a / b),
        _ => None,
    }
}

/// A number in a table.
pub(crate) fn cell(value: &Value) -> String {
    value
        .as_f64()
        .map_or_else(|| "-".to_owned(), |value| format!("{value:.3}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_even_and_nothing() {
        assert_eq!(median([3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median([4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median([]), None);
    }
}
