extern "C" __attribute__((visibility("default"))) int pw_abi_version(void) { return 1; }
