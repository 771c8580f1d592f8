//! What the published clients expect and annotations cannot say. Each file has its reason on top; everything
//! else about REST is in the contract.

pub mod accepted;
pub mod content_length;
pub mod slow_answer;
