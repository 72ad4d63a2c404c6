from support.key_tags import own_scripts, tagged_keys

__all__ = ["own_scripts", "tagged_keys"]
