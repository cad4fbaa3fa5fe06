//! Bytes as hexadecimal digits, two each, as fscache lists keys in `/proc` and as we write them to files.

/// `bytes` in lower case.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The bytes that `digits` stand for; `None` unless these are digits, two for each byte.
#[must_use]
pub fn unhex(digits: &[u8]) -> Option<Vec<u8>> {
    let digit = |at: &u8| char::from(*at).to_digit(16);
    let byte = |pair: &[u8]| {
        let [high, low] = pair else { return None };
        u8::try_from(digit(high)? << 4 | digit(low)?).ok()
    };
    digits.chunks(2).map(byte).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_byte_is_two_digits_and_nothing_else() {
        assert_eq!(hex(&[0, 0xff, 0xa5]), "00ffa5");
        assert_eq!(unhex(b"00fFA5"), Some(vec![0, 0xff, 0xa5]));
        assert_eq!(unhex(b""), Some(Vec::new()));
        for text in ["0", "000", "+1", "-1", " 1", "0x10", "1g", "\u{e9}"] {
            assert_eq!(unhex(text.as_bytes()), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn bytes_are_read_as_they_were_written(bytes: Vec<u8>) {
            prop_assert_eq!(hex(&bytes).len(), 2 * bytes.len());
            prop_assert_eq!(unhex(hex(&bytes).as_bytes()), Some(bytes));
        }

        #[test]
        fn odd_lengths_are_refused(mut bytes: Vec<u8>) {
            bytes.push(0);
            prop_assert_eq!(unhex(&hex(&bytes).as_bytes()[1..]), None);
        }
    }
}
