"TRL's SFTTrainer as the peer of mmkit's training: its step alone, without checkpoints or logs."


def build_sft_trainer(
    model,
    rows,  # a `datasets.Dataset`: TRL takes no list
    data_collator,
    folder,  # for what TRL writes
    max_steps,
    batch_size,
    bf16,
    use_cpu=False,
    learning_rate=1e-5,
    **trainer_options,  # of SFTTrainer: callbacks, processing_class
):
    "A trainer on rows that are ready for the collator."
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        bf16=bf16,
        use_cpu=use_cpu,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        gradient_checkpointing=False,
        dataset_kwargs=dict(skip_prepare_dataset=True),
        max_length=None,
    )
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=data_collator,
        **trainer_options,
    )
