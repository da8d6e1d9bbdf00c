"""What tests of several folders share: small corpora, pools of ranks, training processes."""
