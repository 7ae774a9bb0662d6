"""Training under any launcher: deepspeed launch/train.py --deepspeed_config ds_configs/zero2_fp32.json"""

from bigtfm.cli import train_alone

if __name__ == "__main__":
    train_alone()
