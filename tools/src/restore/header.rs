//! The safetensors format, as far as writing it goes.
//!
//! ```text
//! | header length, 8 bytes | header: JSON, padded with blanks to 8 | tensors, end to end |
//! ```
//!
//! Pure. Always holds: a header describes exactly the tensors given, in their order, without a gap.

use std::fmt::Write as _;

use dtr_engine::{EngineError, Result};
use serde_json::json;

use super::parts::Tensor;
use super::selection::cannot;

/// The one name that no tensor may have.
pub(super) const METADATA_NAME: &str = "__metadata__";
/// Most bytes of a header that readers of the format accept.
const HEADER_BYTES_MAX: usize = 100_000_000;
/// Most bytes of the tensors: what a file can hold, less the longest header.
const TENSOR_BYTES_MAX: u64 = i64::MAX.unsigned_abs() - (1 << 30);
/// What the length of a header is a multiple of.
const HEADER_ALIGNMENT: usize = 8;

/// How the format knows a dtype.
#[derive(Clone, Copy, Debug)]
pub(super) struct FileDtype {
    pub(super) name: &'static str,
    pub(super) item_bytes: u32,
    /// Of packed dtypes, the values in one item: the format counts values.
    pub(super) values_per_item: u64,
}

/// The format's dtype for one of torch's or numpy's; `None` where it has none.
pub(super) fn file_dtype(dtype: &str) -> Option<FileDtype> {
    let (name, item_bytes) = match dtype {
        "bool" | "|b1" => ("BOOL", 1),
        "uint8" | "|u1" => ("U8", 1),
        "int8" | "|i1" => ("I8", 1),
        "float4_e2m1fn_x2" => ("F4", 1),
        "float8_e4m3fn" => ("F8_E4M3", 1),
        "float8_e5m2" => ("F8_E5M2", 1),
        "float8_e8m0fnu" => ("F8_E8M0", 1),
        "float8_e4m3fnuz" => ("F8_E4M3FNUZ", 1),
        "float8_e5m2fnuz" => ("F8_E5M2FNUZ", 1),
        "uint16" | "<u2" => ("U16", 2),
        "int16" | "<i2" => ("I16", 2),
        "float16" | "<f2" => ("F16", 2),
        "bfloat16" => ("BF16", 2),
        "uint32" | "<u4" => ("U32", 4),
        "int32" | "<i4" => ("I32", 4),
        "float32" | "<f4" => ("F32", 4),
        "uint64" | "<u8" => ("U64", 8),
        "int64" | "<i8" => ("I64", 8),
        "float64" | "<f8" => ("F64", 8),
        "complex64" | "<c8" => ("C64", 8),
        _ => return None,
    };
    let values_per_item = if name == "F4" { 2 } else { 1 };
    Some(FileDtype { name, item_bytes, values_per_item })
}

/// The bytes before the first tensor's.
pub(super) fn encode(tensors: &[&Tensor], step: u64) -> Result<Vec<u8>> {
    // `format` is what loaders of model weights look for.
    let metadata = json!({
        "format": "pt",
        "step": step.to_string(),
        "source": concat!("ckpt-tool ", env!("CARGO_PKG_VERSION")),
    });
    let mut text = format!("{{\"{METADATA_NAME}\":{metadata}");
    let mut offset = 0_u64;
    for tensor in tensors {
        let end = offset.saturating_add(tensor.bytes);
        if end > TENSOR_BYTES_MAX {
            // Tensors that repeat a few bytes can claim more than any file holds.
            return Err(cannot(&tensor.path, "with it, the file is larger than files can be"));
        }
        let entry = json!({
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [offset, end],
        });
        write!(text, ",{}:{entry}", json!(tensor.name)).expect("strings grow");
        offset = end;
    }
    text.push('}');
    let padding = text.len().next_multiple_of(HEADER_ALIGNMENT) - text.len();
    text.extend(std::iter::repeat_n(' ', padding));
    if text.len() > HEADER_BYTES_MAX {
        return Err(EngineError::invalid(
            format!("describing {} tensors in a safetensors file", tensors.len()),
            format!("it takes {} bytes, and readers accept {HEADER_BYTES_MAX}", text.len()),
            "write more files, each of fewer tensors, with a smaller `--max-shard-size`",
        ));
    }
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    Ok(bytes)
}
