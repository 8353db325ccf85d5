"""What SGLang's CPU environment needs beside SGLang; nothing here is imported by the trainer."""
