//! Plain values of a state tree, as text and as JSON.
//!
//! Always holds: equal text means equal type and bits, so text may stand for a value when two are
//! compared; JSON keeps numbers as numbers where JSON can say them.

use std::fmt::Write as _;

use dtr_engine::format::tree::{DictKind, Value};
use serde_json::json;

/// The type of what stands at a node, in Python's words.
pub(crate) fn type_name(value: &Value) -> &'static str {
    match value {
        Value::None => "None",
        Value::Bool(_) => "bool",
        Value::Int(_) | Value::BigInt(_) => "int",
        Value::Float(_) => "float",
        Value::Complex(..) => "complex",
        Value::Str(_) => "str",
        Value::Bytes(_) => "bytes",
        Value::Tensor(_) => "tensor",
        Value::NumpyScalar { .. } => "numpy scalar",
        Value::TorchDtype(_) => "torch.dtype",
        Value::TorchDevice(_) => "torch.device",
        Value::TorchSize(_) => "torch.Size",
        Value::NumpyDtype(_) => "numpy.dtype",
        Value::Dict { kind: DictKind::Plain, .. } => "dict",
        Value::Dict { kind: DictKind::Ordered, .. } => "OrderedDict",
        Value::Dict { kind: DictKind::Counter, .. } => "Counter",
        Value::List { .. } => "list",
        Value::Tuple { .. } => "tuple",
    }
}

/// Children that follow a node: entries of a dict with its metadata, items of a list or tuple.
pub(crate) fn children(value: &Value) -> u64 {
    match *value {
        Value::Dict { len, metadata, .. } => u64::from(len) + u64::from(metadata),
        Value::List { len } | Value::Tuple { len } => u64::from(len),
        _ => 0,
    }
}

/// A plain value as Python would write it, or nearly so; containers and tensors by type only.
pub(crate) fn text(value: &Value) -> String {
    match value {
        Value::None => "None".into(),
        Value::Bool(true) => "True".into(),
        Value::Bool(false) => "False".into(),
        Value::Int(number) => number.to_string(),
        // Decimal would cost the square of a length that a file chose.
        Value::BigInt(bytes) => format!("int(0x{})", hex(bytes.iter().rev())),
        Value::Float(number) => float(*number),
        Value::Complex(real, imaginary) => {
            format!("complex({}, {})", float(*real), float(*imaginary))
        }
        Value::Str(text) => format!("{text:?}"),
        Value::Bytes(bytes) => format!("b\"{}\"", bytes.escape_ascii()),
        Value::NumpyScalar { dtype, bytes } => {
            format!("numpy {dtype} {}", numpy_scalar(dtype, bytes))
        }
        Value::TorchDtype(name) => format!("torch.{name}"),
        Value::TorchDevice(name) => format!("torch.device({name:?})"),
        Value::TorchSize(size) => format!("torch.Size({size:?})"),
        Value::NumpyDtype(name) => format!("numpy.dtype({name:?})"),
        Value::Tensor(_) | Value::Dict { .. } | Value::List { .. } | Value::Tuple { .. } => {
            type_name(value).into()
        }
    }
}

/// A plain value as JSON: as itself where JSON has it, else its [`text`]; null for containers.
pub(crate) fn json(value: &Value) -> serde_json::Value {
    match value {
        Value::None
        | Value::Tensor(_)
        | Value::Dict { .. }
        | Value::List { .. }
        | Value::Tuple { .. } => serde_json::Value::Null,
        Value::Bool(value) => json!(value),
        Value::Int(number) => json!(number),
        Value::Float(number) if number.is_finite() => json!(number),
        Value::Str(text) | Value::TorchDevice(text) | Value::NumpyDtype(text) => json!(text),
        Value::TorchSize(size) => json!(size),
        other => json!(text(other)),
    }
}

/// A float as Python writes it; a NaN with its bits, since many are not equal.
fn float(number: f64) -> String {
    const USUAL_NAN: u64 = 0x7ff8_0000_0000_0000;
    match number {
        _ if number.to_bits() == USUAL_NAN => "nan".into(),
        _ if number.is_nan() => format!("nan(0x{:016x})", number.to_bits()),
        _ => format!("{number:?}"),
    }
}

fn numpy_scalar(dtype: &str, bytes: &[u8]) -> String {
    let number = match (dtype, bytes) {
        ("<f8", &[..]) => bytes.try_into().ok().map(|bytes| float(f64::from_le_bytes(bytes))),
        ("<f4", &[..]) => {
            let single = bytes.try_into().ok().map(f32::from_le_bytes);
            single.filter(|number| !number.is_nan()).map(|number| format!("{number:?}"))
        }
        ("<i8", &[..]) => bytes.try_into().ok().map(|bytes| i64::from_le_bytes(bytes).to_string()),
        ("<i4", &[..]) => bytes.try_into().ok().map(|bytes| i32::from_le_bytes(bytes).to_string()),
        ("|b1", [0]) => Some("False".into()),
        ("|b1", [1]) => Some("True".into()),
        _ => None,
    };
    number.unwrap_or_else(|| format!("0x{}", hex(bytes.iter())))
}

fn hex<'a>(bytes: impl Iterator<Item = &'a u8>) -> String {
    bytes.fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("strings grow");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_read_as_in_python() {
        let scalar = |dtype: &str, bytes: &[u8]| Value::NumpyScalar {
            dtype: dtype.into(),
            bytes: bytes.into(),
        };
        for (value, expected) in [
            (Value::None, "None"),
            (Value::Bool(true), "True"),
            (Value::BigInt(vec![1, 0, 0, 0, 0, 0, 0, 0, 0x7f]), "int(0x7f0000000000000001)"),
            (Value::Float(-0.0), "-0.0"),
            (Value::Float(f64::NAN), "nan"),
            (Value::Float(f64::from_bits(0x7ff8_0000_0000_0001)), "nan(0x7ff8000000000001)"),
            (Value::Complex(1.0, -2.0), "complex(1.0, -2.0)"),
            (Value::Str("a\nb".into()), "\"a\\nb\""),
            (Value::Bytes(vec![0, b'a']), "b\"\\x00a\""),
            (scalar("<f4", &0.5_f32.to_le_bytes()), "numpy <f4 0.5"),
            (scalar("<M8[s]", &[1, 2]), "numpy <M8[s] 0x0102"),
            (Value::TorchDtype("bfloat16".into()), "torch.bfloat16"),
            (Value::TorchSize(vec![2, 3]), "torch.Size([2, 3])"),
        ] {
            assert_eq!(text(&value), expected);
        }
    }

    #[test]
    fn json_keeps_numbers() {
        assert_eq!(json(&Value::Float(0.5)), serde_json::json!(0.5));
        assert_eq!(json(&Value::Float(f64::INFINITY)), serde_json::json!("inf"));
        assert_eq!(json(&Value::None), serde_json::Value::Null);
    }
}
