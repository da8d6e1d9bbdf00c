"""DeepSpeed configurations: ZeRO stages and DeepSpeed's own knobs, nothing else (see `elas.config.deepspeed`)."""
